"""PTX and cubin for every card, compiled here without one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the compiler is Triton's")

from super_tree_attention import ahead_of_time
from super_tree_attention.ahead_of_time import ARCHITECTURES, compile_kernel, compile_kernels, main, ptx_version
from super_tree_attention.kernel_floor import GROUP, HEAD_DIM, bytes_of_a_step
from super_tree_attention.kernel_plan import PLAIN_SHARED, STEPS, modest_steps, steps_for

#: Shared memory that one block may ask for, in bytes.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 110: 227 << 10}
SHARED_LIMIT |= dict.fromkeys((89, 120, 121), 99 << 10)
VARIANTS = {
    80: ("bf16", 128, 4),
    89: ("fp16", 64, 16),
    90: ("bf16", 128, 4),
    100: ("fp16", 128, 5),
    103: ("bf16", 128, 4),
    110: ("bf16", 128, 4),
    120: ("bf16", 64, 1),
    121: ("bf16", 128, 4),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kernels_compile_without_a_gpu(architecture):
    compiled = compile_kernels(architecture, *VARIANTS[architecture])
    assert {"attention_16", "attention_64", "combine", "gather_rows", "scatter_rows"} <= set(compiled)
    for kernel in compiled.values():
        assert kernel.cubin.startswith(b"\x7fELF")
        assert f".target sm_{architecture}" in kernel.ptx
        assert f".version {ptx_version(architecture) / 10}" in kernel.ptx
        assert kernel.shared <= SHARED_LIMIT[architecture]
        assert kernel.spills == 0
        entry = re.search(rf"\.entry {kernel.name}\((.*?)\)", kernel.ptx, re.DOTALL)
        assert entry[1].count(".param") == len(kernel.arguments) + 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modest_kernels_need_no_more_shared_memory_than_any_kernel_gets(architecture):
    for rows in (16, 64):
        for head_dim, group in ((128, 4), (128, 16)):
            kernel = compile_kernel("attention", architecture, "bf16", head_dim, group, rows, modest=True)
            assert kernel.shared <= PLAIN_SHARED == 49_152
            assert kernel.spills == 0


@pytest.mark.parametrize("architecture", [80, 89])
def test_kernels_in_float32_fit_cards_of_less_shared_memory(architecture, monkeypatch):
    """A failing self-check proposes float32, which PyTorch runs on every card."""
    monkeypatch.setattr(ahead_of_time, "DTYPES", ("fp32",))
    for rows in (16, 64):
        assert steps_for(rows, architecture, 4) == modest_steps(rows, architecture)
        assert steps_for(rows, architecture, 2) == steps_for(rows, 90, 4) == STEPS
        kernel = compile_kernel("attention", architecture, "fp32", 128, 4, rows, modest=True)
        assert kernel.shared <= SHARED_LIMIT[architecture]


@pytest.mark.parametrize(
    ("release", "cards"),
    [("12.8", {80: 87, 90: 87, 120: 87}), ("12.9", {90: 88, 103: 88, 121: 88}), ("13.4", {90: 88, 110: 90, 121: 88})],
)
def test_ptx_is_no_newer_than_what_the_assembler_knows(release, cards, monkeypatch, tmp_path):
    """Triton 3.6 brings CUDA 12.8's, which refuses PTX 8.8."""
    assembler = tmp_path / "ptxas"
    assembler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    assembler.chmod(0o755)
    monkeypatch.setattr(ahead_of_time, "_assembler", lambda *_: str(assembler))
    ptx_version.cache_clear()
    try:
        assert {card: ptx_version(card) for card in cards} == cards
        if release == "12.8":
            with pytest.raises(ValueError, match=r"capability 103 needs PTX 8.8, and this Triton's ptxas knows 8.7"):
                ptx_version(103)
    finally:
        ptx_version.cache_clear()


def test_the_keys_and_values_of_the_past_are_loaded_16_bytes_at_a_time_and_ahead():
    kernel = compile_kernel("attention", 90, "bf16", 128, 4, 64)
    copies = re.findall(r"cp\.async\.cg\.shared\.global .*?, (0x[0-9a-f]+|\d+),", kernel.ptx)
    assert len(copies) >= 3 * 8  # keys and values, two steps before the loop and one in it
    assert {int(width, 0) for width in copies} == {16}


def test_a_kernel_for_an_unknown_card_or_type_is_refused():
    with pytest.raises(ValueError, match="compute capability 75 is not supported; choose one of 80, 89"):
        compile_kernels(75, "bf16", 128, 4)
    with pytest.raises(ValueError, match="head dimension 96"):
        compile_kernels(90, "bf16", 96, 4)
    with pytest.raises(ValueError, match="group of query heads 17"):
        compile_kernels(90, "fp16", 128, 17)


def test_the_table_is_printed_and_the_files_are_written(tmp_path, capsys):
    main(["--arch", "90", "--groups", "4", "--out", str(tmp_path)])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 4 * 6
    assert len(list(tmp_path.glob("*.cubin"))) == len(list(tmp_path.glob("*.ptx"))) == 4 * 6


def test_an_unknown_card_ends_the_command_with_one_sentence(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--arch", "75"])
    assert exit_.value.code == 2
    assert "compute capability 75 is not supported" in capsys.readouterr().err


def test_the_reference_needs_no_triton():
    code = "import sys, super_tree_attention; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_loop_over_the_past_moves_each_key_and_value_once():
    for rows in (16, 64, 128):
        kernel = compile_kernel("attention", 90, "bf16", HEAD_DIM, GROUP, rows)
        assert bytes_of_a_step(kernel) == STEPS.keys * HEAD_DIM * 2 * 2
