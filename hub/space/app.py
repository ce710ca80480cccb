"""What the Space runs: the demo of `vireid demo --web`, reachable from outside its container."""

from vireid_timm.web.app import serve

if __name__ == '__main__':
    serve(host='0.0.0.0')
