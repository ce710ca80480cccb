"""A run's folder belongs to one process at a time, and keeps its log."""

import errno
import fcntl
import logging
from pathlib import Path
from typing import Any

import pytest

from vireid_timm.run_folder import LOCK, LOG, open_run_folder


def test_a_folder_is_locked_within_the_block(tmp_path: Path) -> None:
    with open_run_folder(tmp_path):
        with pytest.raises(ValueError, match=f'another process is training in {tmp_path}'):
            open_run_folder(tmp_path).__enter__()
        with open_run_folder(tmp_path / 'other'):
            pass
    with open_run_folder(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_locks_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    (tmp_path / '.last.pth.0123abcd.part').write_bytes(b'of somebody who may still be writing')
    with open_run_folder(tmp_path):
        assert (tmp_path / '.last.pth.0123abcd.part').exists()


def test_a_log_has_the_lines_of_this_package_alone(tmp_path: Path) -> None:
    with open_run_folder(tmp_path):
        logging.getLogger('vireid_timm.somewhere').info('ours')
        logging.getLogger('elsewhere').warning('theirs')
    logging.getLogger('vireid_timm').info('too late')
    (line,) = (tmp_path / LOG).read_text().splitlines()
    assert line.endswith(' ours')


def test_the_log_says_why_a_run_ended(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(OSError), open_run_folder(tmp_path):
        raise OSError('the disk is gone')
    assert (tmp_path / LOG).read_text().endswith(' OSError: the disk is gone\n')
    assert not capsys.readouterr().err, 'the caller prints it'


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / LOG).symlink_to('/dev/full')
    done = False
    with open_run_folder(tmp_path):
        logging.getLogger('vireid_timm').info('a line')
        done = True
    assert done and 'Traceback' not in capsys.readouterr().err
