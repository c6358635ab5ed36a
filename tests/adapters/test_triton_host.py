"""What is Triton's own of its process: its lines, its stack and its reasons. Its faults: test_triton_faults.py."""

import os
import resource
import sys

from echo_trt.adapters.triton import host
from echo_trt.supervision.process import Process, ProcessLog

PROGRAM = r"""
import resource
print('I1201 10:41:50.123456 77 server.cc:1] "started"')
print("W1201 10:41:50.123456 77 metrics.cc:1] no NVML library")
print(resource.getrlimit(resource.RLIMIT_STACK)[0])
print('E1201 10:41:50.123456 77 model.cc:1] UserError: no such bundle.\\n\\nAt:\\n  model.py(7): run')
"""


def test_its_lines_are_read_and_its_reason_is_the_models(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "HARMLESS", ("nvml",))
    with (tmp_path / "log").open("wb") as out:
        log = ProcessLog(out.fileno())
        ours, other = (
            kind("triton", [sys.executable, "-c", PROGRAM], dict(os.environ), log)
            for kind in (host.TritonProcess, Process)
        )
        assert ours.wait(60)
        assert other.wait(60)
        assert ours.reason() == "no such bundle"
        assert ours.refused
        assert not other.refused
        other.reason()
        log.close(60)
    started, stack, error = ours.lines
    assert started == 'server.cc:1] "started"'
    assert error.startswith("error: model.cc:1] UserError")
    maximum = resource.getrlimit(resource.RLIMIT_STACK)[1]
    assert int(stack) == (512 * 2**20 if maximum == resource.RLIM_INFINITY else min(512 * 2**20, maximum))
    assert int(other.lines[2]) == resource.getrlimit(resource.RLIMIT_STACK)[0]
    assert " ERROR triton: model.cc:1] UserError" in (tmp_path / "log").read_text()
