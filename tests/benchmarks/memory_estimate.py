"""How far the planner's memory estimate is from what a training step really takes, on the CPU.

For several plans, each in a process of its own: the growth of the resident memory at its peak over two steps (forward,
backward, optimizer; the second one has the optimizer's state) against ``mfm_nnunet.models.memory``. Twice: with glibc's
allocator as it is, which keeps small freed blocks and so fragments, and made to return each block at once
(MALLOC_MMAP_THRESHOLD_), which shows what the step itself needs. Run it with
``python -m tests.benchmarks.memory_estimate`` from the repository's root; Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from mfm_nnunet.engine.optim import make_optimizer
from mfm_nnunet.models.memory import estimate_training_memory, num_parameters
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.primus_family import primus_architecture
from tests.builders.architectures import resenc

NUM_OUTPUTS = 3


def resenc_architecture(base: int, largest: int, blocks: tuple[int, ...], num_axes: int) -> dict:
    """A plan's ResEnc U-Net with isotropic strides, one stage per entry of ``blocks``."""
    return resenc(num_axes, [min(largest, base * 2**stage) for stage in range(len(blocks))], blocks)


SMALL, STANDARD = (1, 2, 2, 2), (1, 3, 4, 6, 6, 6)
CASES: dict[str, tuple[dict, tuple[int, ...], int, str]] = {
    "ResEnc CPU 3D": (resenc_architecture(16, 128, SMALL, 3), (40, 56, 40), 2, "sgd"),
    "ResEnc CPU 3D, batch 4": (resenc_architecture(16, 128, SMALL, 3), (40, 56, 40), 4, "sgd"),
    "ResEnc CPU 3D, large patch": (resenc_architecture(16, 128, SMALL, 3), (96, 96, 96), 2, "sgd"),
    "ResEnc CPU 2D": (resenc_architecture(16, 128, (1, 2, 2, 2, 2, 2), 2), (192, 192), 4, "sgd"),
    "ResEnc standard 3D": (resenc_architecture(32, 320, STANDARD, 3), (64, 64, 64), 2, "sgd"),
    "ResEnc standard 2D": (resenc_architecture(32, 512, (*STANDARD, 6), 2), (256, 256), 4, "sgd"),
    "Primus CPU 3D": (primus_architecture("CPU", (40, 56, 40)), (40, 56, 40), 2, "adamw"),
    "Primus CPU 3D, large patch": (primus_architecture("CPU", (96, 96, 96)), (96, 96, 96), 2, "adamw"),
    "Primus CPU 2D": (primus_architecture("CPU", (192, 192)), (192, 192), 4, "adamw"),
    "Primus S 3D": (primus_architecture("S", (64, 64, 64)), (64, 64, 64), 2, "adamw"),
}


def main() -> None:
    """Print a table: plan, parameters, estimate, measured, their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", choices=list(CASES), help="measure one plan here and print its bytes (used internally)"
    )
    parser.add_argument("--only", default="", help="run only plans whose name contains this")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, MB of 1e6 bytes")
    print(f"{'':28s}{'':>14s}{'':>6s}{'params':>9s}{'estimate':>10s}{'measured':>10s}{'':>7s}{'exact':>10s}")
    print(
        f"{'plan':28s}{'patch':>14s}{'batch':>6s}{'M':>9s}{'MB':>10s}{'MB':>10s}{'ratio':>7s}{'MB':>10s}{'ratio':>7s}"
    )
    ratios: list[tuple[float, float]] = []
    for name, (architecture, patch, batch, optimizer) in CASES.items():
        if options.only not in name:
            continue
        with torch.device("meta"):
            network = _network(architecture, patch)
        estimate = estimate_training_memory(network, (batch, 1, *patch), optimizer).total  # type: ignore[arg-type]
        measured, exact = _in_child(name, {}), _in_child(name, {"MALLOC_MMAP_THRESHOLD_": "65536"})
        ratios.append((measured / estimate, exact / estimate))
        print(
            f"{name:28s}{'x'.join(map(str, patch)):>14s}{batch:6d}{num_parameters(network) / 1e6:9.2f}"
            f"{estimate / 1e6:10.0f}{measured / 1e6:10.0f}{ratios[-1][0]:7.2f}{exact / 1e6:10.0f}{ratios[-1][1]:7.2f}",
            flush=True,
        )
    for title, column in zip(("measured", "exact"), zip(*ratios)):
        print(f"{title} / estimate: {min(column):.2f} to {max(column):.2f}")


def _in_child(name: str, environment: dict[str, str]) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.memory_estimate", "--case", name]
    root = Path(__file__).parents[2]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=root, env={**os.environ, **environment}
    )
    return int(json.loads(run.stdout.splitlines()[-1]))


def measure(name: str) -> int:
    """Bytes by which this process grew at its peak in two training steps."""
    architecture, patch, batch, optimizer_kind = CASES[name]
    _train(_network(CASES["ResEnc CPU 2D"][0], (64, 64)), (2, 1, 64, 64), "sgd", steps=1)  # the libraries' own buffers
    _train(_network(primus_architecture("CPU", (16, 16, 16)), (16, 16, 16)), (2, 1, 16, 16, 16), "adamw", steps=1)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    _train(_network(architecture, patch), (batch, 1, *patch), optimizer_kind, steps=2)
    return _status("VmHWM") - before


def _network(architecture: dict, patch: tuple[int, ...]) -> torch.nn.Module:
    plans = {"configurations": {"only": {"patch_size": list(patch), "architecture": architecture}}}
    return build_network(plans, "only", 1, NUM_OUTPUTS, deep_supervision=True)


def _train(network: torch.nn.Module, shape: tuple[int, ...], kind: str, steps: int) -> None:
    optimizer = make_optimizer(network.parameters(), kind, 1e-3, 0.0)  # type: ignore[arg-type]
    x = torch.randn(shape)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        outputs = network(x)
        loss = torch.stack([output.square().mean() for output in _listed(outputs)]).sum()
        loss.backward()
        optimizer.step()


def _listed(outputs: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


if __name__ == "__main__":
    main()
