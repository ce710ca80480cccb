"""Devices fall back with a log line, precision is chosen by the device."""

import logging

import pytest
import torch

from vireid_timm.device import autocast_dtype, named_device, resolve_device
from vireid_timm.distributed import process_group


def test_a_missing_device_falls_back_to_the_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        assert resolve_device('cuda').type == 'cuda'
        return
    with caplog.at_level(logging.INFO, 'vireid_timm'):
        assert resolve_device('cuda') == torch.device('cpu')
    assert 'using the CPU' in caplog.text


def test_an_unknown_device_is_an_error() -> None:
    for choose in (named_device, resolve_device, lambda name: process_group(name).__enter__()):
        with pytest.raises(ValueError, match="unknown device 'gpu'"):
            choose('gpu')


def test_a_device_that_cannot_compute_is_an_error() -> None:
    for choose in (resolve_device, lambda name: process_group(name).__enter__()):
        with pytest.raises(ValueError, match='torch cannot compute on meta here: '):
            choose('meta')


def test_a_named_device_need_not_be_there() -> None:
    assert named_device('cuda:7') == torch.device('cuda', 7)
    assert named_device(torch.device('cpu')) == torch.device('cpu')


def test_precision_can_be_forced_and_is_float32_or_bfloat16_otherwise() -> None:
    cpu = torch.device('cpu')
    assert autocast_dtype(cpu, False) is None
    assert autocast_dtype(cpu, True) == torch.bfloat16
    assert autocast_dtype(cpu, True, 'float16') == torch.float16
    assert autocast_dtype(cpu, None) in (None, torch.bfloat16)
