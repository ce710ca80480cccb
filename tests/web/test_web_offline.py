"""Connections to other machines are refused while the demo runs, and only then."""

import socket

import pytest

from vireid_timm.web.offline import offline


def test_other_machines_are_refused_within_the_block_only() -> None:
    # Still addresses of this machine, so nothing leaves it if they are not refused.
    with socket.create_server(('127.0.0.2', 0)) as named, socket.create_server(('127.0.0.3', 0)) as other:
        with offline('127.0.0.2'):
            with socket.create_connection(named.getsockname()):
                pass
            assert socket.getaddrinfo('localhost', 80)
            with pytest.raises(PermissionError, match='elsewhere.example'):
                socket.getaddrinfo('elsewhere.example', 80)
            with socket.socket() as connection, pytest.raises(PermissionError, match='127.0.0.3'):
                connection.connect(other.getsockname())
        with socket.create_connection(other.getsockname()):
            pass
