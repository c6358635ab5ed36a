"""ONNX to TensorRT engines, which are built for the card that they are built on."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from echo_trt.backends.tensorrt.graph import check_graph
from echo_trt.backends.tensorrt.library import first_sentence, load_tensorrt, logger_of
from echo_trt.errors import UserError

ProfileShapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, usual and largest shape of an input
Profile = Mapping[str, ProfileShapes]  # by input
TellPhase = Callable[[float, str], None]  # takes a build's progress, from 0 to 1, and its phase

#: Warnings that do not concern an engine's numbers.
HARMLESS = (
    re.compile(r"Make sure (in|out)put \S+ has Int64 binding"),
    re.compile(r"The logger passed into createInfer\w+ differs from one already registered"),
)


@dataclass(frozen=True)
class CompileJob:
    """One engine to compile from ``graph``, an ONNX file, for ``profiles`` of sizes.

    ``timing_cache`` is read where it exists, and written; the compiler's messages are appended to ``log``. An unknown
    warning of the parser stops the build, unless the engine's numbers are ``checked`` on the card afterwards.
    """

    graph: Path
    profiles: Sequence[Profile]
    timing_cache: Path
    log: Path
    checked: bool = False


def compile_engine(job: CompileJob, out: Path, detail: TellPhase = lambda share, phase: None) -> None:
    """Write the engine to ``out``. A refusal contains the compiler's message."""
    api = load_tensorrt()
    logger = logger_of(api)
    with job.log.open("a", encoding="utf-8") as log, logger.writing_to(log):
        builder = api.Builder(logger)
        network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = api.OnnxParser(network, logger)
        check_graph(job.graph, parser.supports_operator)
        _parse(parser, job, logger)
        config = builder.create_builder_config()
        # The engine then tells of its layers whether one copies a cache.
        config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
        timings = config.create_timing_cache(job.timing_cache.read_bytes() if job.timing_cache.exists() else b"")
        config.set_timing_cache(timings, True)
        for shapes in job.profiles:
            profile = builder.create_optimization_profile()
            for name, minimum_usual_maximum in shapes.items():
                profile.set_shape(name, *minimum_usual_maximum)
            config.add_optimization_profile(profile)
        engine = _build(api, builder, network, config, detail)
        if engine is None:
            raise UserError(
                f"TensorRT could not build {job.graph.stem}: {first_sentence(logger.errors())}; "
                "use another precision, or --engine cpu."
            )
        out.write_bytes(engine)
        job.timing_cache.write_bytes(config.get_timing_cache().serialize())


def _parse(parser: Any, job: CompileJob, logger: Any) -> None:
    graph = job.graph
    logger.forget()  # earlier messages concern flags and libraries
    if not parser.parse_from_file(str(graph)):
        error = parser.get_error(0)
        raise UserError(
            f"TensorRT cannot read {graph}: operator {error.node_operator() or '?'} "
            f"{error.node_name()}: {first_sentence([error.desc()])}."
        )
    for warning in () if job.checked else logger.warnings():
        if not any(harmless.search(warning) for harmless in HARMLESS):
            raise UserError(
                f"TensorRT warned while reading {graph}: {first_sentence([warning])}; this is not known to be "
                "harmless, so no engine was built: export the network with echo-trt build."
            )


def _build(api: ModuleType, builder: Any, network: Any, config: Any, detail: TellPhase) -> Any:
    """Build in another thread, so that a Ctrl-C is raised here and not inside the compiler's callbacks."""
    monitor = _monitor_class(api)(detail)
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1) as executor:  # its end waits for the build, which the network must outlive
        future = executor.submit(builder.build_serialized_network, network, config)
        try:
            engine = future.result()
        except BaseException:
            monitor.cancelled = True
            raise
    if monitor.error is not None:
        raise monitor.error
    return engine


@cache
def _monitor_class(api: ModuleType) -> type:
    class Monitor(api.IProgressMonitor):
        """Adds up nested phases: a phase is one step of its parent."""

        def __init__(self, detail: TellPhase):
            api.IProgressMonitor.__init__(self)
            self._detail, self._lock = detail, threading.Lock()
            self._phases: dict[str, list[int]] = {}  # outermost first: finished steps, all steps
            self.cancelled = False
            self.error: Exception | None = None  # raised by ``detail``; the compiler would not survive it

        def phase_start(self, phase_name, parent_phase, num_steps):
            with self._lock:
                self._phases[phase_name] = [0, max(num_steps, 1)]

        def step_complete(self, phase_name, step):
            with self._lock:
                if phase_name in self._phases:
                    self._phases[phase_name][0] = step + 1
                try:
                    self._detail(self._share(), phase_name)
                except Exception as error:
                    self.error, self.cancelled = error, True
            return not self.cancelled

        def phase_finish(self, phase_name):
            with self._lock:
                self._phases.pop(phase_name, None)

        def _share(self) -> float:
            share, part = 0.0, 1.0
            for done, steps in self._phases.values():
                share += part * done / steps
                part /= steps
            return min(share, 1.0)

    return Monitor
