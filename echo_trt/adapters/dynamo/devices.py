"""The CUDA devices of workers on one machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_devices(engine: str, environment: Mapping[str, str]) -> list[str]:
    """List the devices that ``engine`` may use, as VARIABLE names them."""
    if engine == "openvino":
        return []
    if VARIABLE in environment:
        return [name.strip() for name in environment[VARIABLE].split(",") if name.strip()]
    from echo_trt.backends.cuda.device import device_count

    return [str(device) for device in range(device_count())]


def divided(devices: Sequence[str], workers: int, each: int) -> list[dict[str, str]]:
    """Give every worker ``each`` of the devices; workers share devices where there are fewer.

    Returns what a worker has in its environment beside the rest. It is nothing where there are not enough devices for
    one worker: that worker says so by itself.
    """
    sets = len(devices) // each
    if not sets:
        return [{}] * workers
    begins = [worker % sets * each for worker in range(workers)]
    return [{VARIABLE: ",".join(devices[begin : begin + each])} for begin in begins]
