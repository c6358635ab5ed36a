"""Load on servers, old beside new: ``--help`` tells how; the code is ``echo_trt_lab.load``."""

from echo_trt.engine.options import run_alone
from echo_trt_lab.load import __doc__ as about
from echo_trt_lab.load import main

if __name__ == "__main__":
    run_alone(main, about)
