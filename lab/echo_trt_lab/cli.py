"""The commands inspect, calibrate, bench and simulate, which ``echo-trt`` finds by their entry points."""

from __future__ import annotations

from echo_trt.cli.terminal import Screen, messages
from echo_trt.engine.options import command
from echo_trt_lab.benchmark.options import BenchOptions
from echo_trt_lab.calibration.options import CalibrateOptions
from echo_trt_lab.simulation.options import SimulateOptions
from echo_trt_lab.sizing.options import InspectOptions


@command
def calibrate(options: CalibrateOptions) -> None:
    """Learn how far this bundle's draft can be trusted, and what passes cost on this machine.

    Writes calibration.json, costs.json and calibration.html, a report of both. Use prompts like those that will be
    served, but none that a benchmark is run on.

    Example: `echo-trt calibrate bundles/smollm2-135m --prompts prompts.jsonl`
    """
    from echo_trt_lab.calibration.command import run
    from echo_trt_lab.simulation.prediction import predict

    run(options, Screen(), messages, predict)


@command
def bench(options: BenchOptions) -> None:
    """Measure policies against plain decoding: closed loop, greedy, all side by side in turns of a second.

    Example: `echo-trt bench bundles/smollm2-135m --prompts prompts.jsonl --batch 1,4,16 --html report.html`
    """
    from echo_trt_lab.benchmark.command import run

    run(options, Screen(), messages)


@command
def simulate(options: SimulateOptions) -> None:
    """Replay recorded draft trees under the same policies and another machine's costs.

    Example: `echo-trt simulate trees.npz --calibration bundles/smollm2-135m/calibration.json --machine h100-qwen3-8b`
    """
    from echo_trt_lab.simulation.command import run

    run(options, Screen(), messages)


@command
def inspect(options: InspectOptions) -> int:
    """Show what a bundle holds, or what a recipe would build and need of each GPU.

    A bundle's files are checked against their hashes. A recipe's checkpoints need not be there. Of a GGUF file and no
    option it shows what `serve` makes.

    Examples: `echo-trt inspect qwen3-32b --fit "H100-80GB x2"`,
    `echo-trt inspect Qwen/Qwen3-1.7B --precision int8 --max-model-len 4096 --max-num-seqs 8`
    """
    from echo_trt_lab.sizing.command import run

    return run(options, Screen())
