"""All Triton kernels, compiled here for every card without one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the compiler is Triton's")

import triton
from triton import JITFunction

from echo_trt.models import fp8_kernel
from echo_trt_lab.kernels.compiled import compiled, main, sources
from echo_trt_lab.kernels.floor import GROUP, HEAD_DIM, bytes_of_a_step
from super_tree_attention import kernel, layer_kernels, sampling_kernels
from super_tree_attention.kernel_plan import ROWS, SHARED, STEPS, largest_tile, tiles_at_a_time

#: Bytes that Triton 3.7 spills in the largest tiles for sm_80 and sm_100; 3.9 spills some of FP8 products alone.
SPILLED = 48 if triton.__version__.startswith("3.7") else 8
#: A card of each generation; ``python -m echo_trt_lab.kernels.compiled`` takes the others, too.
VARIANTS = {
    80: ("bf16", 128, 4), 89: ("bf16", 128, 4), 90: ("bf16", 128, 4), 100: ("fp16", 128, 5), 120: ("bf16", 128, 16),
}  # fmt: skip


@pytest.mark.parametrize("architecture", list(VARIANTS))
def test_all_kernels_compile_without_spills(architecture):
    windows = architecture != 100
    for name in sources(*VARIANTS[architecture], architecture):
        if name.endswith("_window") and not windows:
            continue
        kernel = compiled(name, architecture, *VARIANTS[architecture])
        assert kernel.cubin.startswith(b"\x7fELF")
        assert f".target sm_{architecture}" in kernel.ptx
        assert kernel.shared <= SHARED.get(architecture, 99) << 10
        assert kernel.spills <= SPILLED


def test_all_kernels_that_are_launched_are_in_the_list():
    """A kernel that is only compiled on a card shows its first fault there."""
    listed = {source.function.fn.__name__ for source in sources("bf16", 128, 4, 90).values()}
    modules = kernel, layer_kernels, sampling_kernels, fp8_kernel
    defined = {name for module in modules for name, made in vars(module).items() if isinstance(made, JITFunction)}
    assert listed == {name for name in defined if not name.startswith("_")}


@pytest.mark.parametrize(("head_dim", "architecture"), [(16, 90), (32, 90), (256, 89), (256, 90)])
def test_other_heads_compile_without_spills(head_dim, architecture):
    for rows in (rows for rows in ROWS if rows <= largest_tile(head_dim)):
        kernel = compiled(f"attention_{rows}", architecture, "bf16", head_dim, 4)
        assert kernel.spills == 0
        assert kernel.shared <= SHARED.get(architecture, 99) << 10
    for name in ("combine", "rotated"):
        assert compiled(name, architecture, "bf16", head_dim, 4).spills == 0


@pytest.mark.parametrize("architecture", list(VARIANTS))
def test_the_plan_knows_how_many_tiles_a_multiprocessor_runs(architecture):
    """By registers, of which a warp gets them in eights per thread, and by shared memory, 1 KB more per program."""
    for rows in ROWS:
        kernel = compiled(f"attention_{rows}", architecture, "bf16", 128, 4)
        by_registers = (1 << 16) // (-(-kernel.registers // 8) * 8 * kernel.threads)
        by_memory = ((SHARED.get(architecture, 99) + 1) << 10) // (kernel.shared + 1024)
        assert tiles_at_a_time(rows, architecture) == min(by_registers, by_memory)


@pytest.mark.parametrize("architecture", [80, 89])
def test_kernels_in_float32_fit_cards_of_less_shared_memory(architecture):
    """A failing self-check proposes float32, which PyTorch runs on every card."""
    for rows in ROWS:
        assert compiled(f"attention_{rows}", architecture, "fp32", 128, 4).shared <= SHARED.get(architecture, 99) << 10


def test_the_keys_and_values_of_the_past_are_loaded_16_bytes_at_a_time_and_ahead():
    kernel = compiled("attention_64", 90, "bf16", 128, 4)
    copies = re.findall(r"cp\.async\.cg\.shared\.global .*?, (0x[0-9a-f]+|\d+),", kernel.ptx)
    assert len(copies) >= 3 * 8  # keys and values, two steps before the loop and one in it
    assert {int(width, 0) for width in copies} == {16}


def test_the_table_is_printed_and_the_files_are_written(tmp_path, capsys):
    main(["--arch", "90", "--head-dims", "128", "--groups", "4", "--out", str(tmp_path)])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 23 + 18  # in bf16 also FP8's five
    assert len(list(tmp_path.glob("*.cubin"))) == len(list(tmp_path.glob("*.ptx"))) == 23 + 18


def test_an_unknown_card_ends_the_command_with_one_sentence(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--arch", "75"])
    assert exit_.value.code == 2
    assert "--arch names 75; choose from 80, 86" in capsys.readouterr().err


def test_the_reference_needs_no_triton():
    code = "import sys, super_tree_attention; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_loop_over_the_past_moves_each_key_and_value_once():
    for rows in ROWS:
        kernel = compiled(f"attention_{rows}", 90, "bf16", HEAD_DIM, GROUP)
        assert bytes_of_a_step(kernel) == STEPS.keys * HEAD_DIM * 2 * 2
