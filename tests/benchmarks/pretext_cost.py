"""What a step of each pretext task costs, relative to a plain supervised step of the same network in the same run.

Each pair of task and network runs in a process of its own, several rounds of all of them in turn; the median is
printed. A step is forward, backward, clipping and optimiser on a batch that is ready; making an item is timed apart.
The supervised step has nnU-Net's Dice and cross entropy, with deep supervision where the network has it, and the same
optimiser. Swin, PCT-Net and the encoder of timm are planned for images of --patch by their own family, which may take a
smaller patch: compare within a network. On the CPU times are CPU seconds of one thread and memory is the growth of the
resident set (Linux); on CUDA wall seconds and torch's peak of allocated memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.pretext_cost --rounds 3
    python -m tests.benchmarks.pretext_cost --size M --patch 160 160 160 --device cuda --precision bf16
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfm_nnunet.device import autocast
from mfm_nnunet.engine.optim import make_optimizer
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.families import Sizing, family_named
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.primus_family import primus_architecture
from mfm_nnunet.tasks.base import find_task, list_tasks
from tests.benchmarks.memory_estimate import SMALL, STANDARD, resenc_architecture
from tests.benchmarks.pretext_pictures import make_batch, make_item

NETWORKS = ("resenc", "primus", "swin", "pctnet", "timm")
GPU_GB = 24
"""Memory for which Swin, PCT-Net and timm are planned, unless the size is CPU."""
SUPERVISED = "supervised"
NUM_LABELS = 3
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def all_pairs() -> list[str]:
    """``supervised on network`` first, then every task."""
    tasks = [(SUPERVISED, NETWORKS), *((task.name, task.backbones) for task in list_tasks())]
    return [f"{name} on {network}" for network in NETWORKS for name, networks in tasks if network in networks]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=["CPU", "S", "B", "M", "L"], default="CPU", help="of Primus; all but CPU: the large ResEnc")
    add("--encoder", default="vit_pe_spatial_tiny_patch16_512.fb", help="of timm; random weights")
    add("--patch", type=int, nargs="+", default=[40, 56, 40])
    add("--batch", type=int, default=2)
    add("--steps", type=int, default=5, help="timed steps of a round, after two others")
    add("--rounds", type=int, default=3)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=list(DTYPES), default="fp32")
    add("--pairs", nargs="+", choices=all_pairs(), default=all_pairs(), metavar="'TASK on NETWORK'")
    add("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
        return
    supervised = [f"{SUPERVISED} on {n}" for n in NETWORKS if any(pair.endswith(n) for pair in arguments.pairs)]
    pairs = list(dict.fromkeys([*supervised, *arguments.pairs]))
    results: dict[str, list[dict[str, float]]] = {pair: [] for pair in pairs}
    for _ in range(arguments.rounds):
        for pair in pairs:
            results[pair].append(in_child(pair))
    print_table(arguments, results)


def in_child(pair: str) -> dict[str, float]:
    """Measure a pair in a fresh process, with the allocator made to give back each block at once."""
    line = [sys.executable, "-m", "tests.benchmarks.pretext_cost", *sys.argv[1:], "--measure", pair]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[2], env=environment
    )
    return json.loads(run.stdout.splitlines()[-1])


def print_table(arguments: argparse.Namespace, results: dict[str, list[dict[str, float]]]) -> None:
    patch, where = "x".join(map(str, arguments.patch)), arguments.device
    name = (
        torch.cuda.get_device_name() if where == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {name}, size {arguments.size}, patch {patch}, batch {arguments.batch}, ", end="")
    print(f"{arguments.precision}, median of {arguments.rounds} rounds\n")
    print("| task | network | steps per second | step, relative | memory in GB | memory, relative | s per item |")
    print("|---|---|---|---|---|---|---|")
    medians = {p: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for p, rounds in results.items()}
    for pair, row in medians.items():
        task, _, network = pair.partition(" on ")
        base = medians[f"{SUPERVISED} on {network}"]
        cells = [task, network, f"{1 / row['step']:.2f}", f"{row['step'] / base['step']:.2f}"]
        cells += [f"{row['bytes'] / 1e9:.2f}", f"{row['bytes'] / base['bytes']:.2f}"]
        cells += [f"{row['item']:.3f}" if task != SUPERVISED else ""]
        print(f"| {' | '.join(cells)} |")
    patches = {network: plan(network, arguments)[1] for network in sorted({pair.split()[-1] for pair in results})}
    print("\npatches:", ", ".join(f"{network} {'x'.join(map(str, own))}" for network, own in patches.items()))


def measure(pair: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step and of making an item, and bytes at the peak, in this process."""
    task, _, network = pair.partition(" on ")
    device = torch.device(arguments.device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    make = supervised_loss if task == SUPERVISED else pretext_loss
    module, loss_of, item_seconds = make(task, network, arguments)
    module.to(device).train()
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = make_optimizer(weights, "adamw", 1e-4, 0.01)
    times = [clock(device)]
    for _ in range(2 + arguments.steps):
        with autocast(device, DTYPES[arguments.precision]):
            loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 12.0)
        optimizer.step()
        times.append(clock(device))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"step": (times[-1] - times[2]) / arguments.steps, "item": item_seconds, "bytes": peak}


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def plan(network: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the architecture and the patch of a network."""
    patch, is_small = tuple(arguments.patch), arguments.size == "CPU"
    base, largest, blocks = (16, 128, SMALL) if is_small else (32, 320, STANDARD)
    resenc = resenc_architecture(base, largest, blocks, len(patch))
    if network in ("resenc", "primus"):
        return (resenc if network == "resenc" else primus_architecture(arguments.size, patch)), patch
    variant, spacing = f"timm:{arguments.encoder}" if network == "timm" else network, (1.0,) * len(patch)
    memory = None if is_small else GPU_GB
    planned = family_named(variant).plan_network(
        Sizing(variant, tuple(map(float, patch)), spacing, memory, 1, NUM_LABELS, {"architecture": resenc})
    )
    return planned.architecture, tuple(planned.patch_size)


def make_network(planned: tuple[dict[str, Any], tuple[int, ...]], num_outputs: int, **keywords: Any) -> torch.nn.Module:
    architecture, patch = planned
    plans = {
        "plans_name": "cost",
        "configurations": {"only": {"patch_size": list(patch), "architecture": architecture}},
    }
    return build_network(plans, "only", 1, num_outputs, **keywords)


def pretext_loss(name: str, network: str, arguments: argparse.Namespace) -> tuple[torch.nn.Module, Callable, float]:
    """The task, its loss on a batch that is ready, and the seconds that one item took."""
    planned, task_class = plan(network, arguments), find_task(name)
    config, patch = task_class.Config(), planned[1]
    module = make_network(planned, task_class.num_outputs(config, 1))
    backbone = make_backbone(module, patch, task_class.restoring)
    config = task_class.resolve(config, backbone.geometry())
    task, transform = task_class(config, backbone), task_class.transform(config, patch)
    rng = np.random.default_rng(0)
    volumes = [rng.normal(size=(1, *(2 * side for side in patch))).astype(np.float32) for _ in range(2)]
    start = time.process_time()
    items = [make_item(transform, volumes, rng) for _ in range(arguments.batch)]
    seconds = (time.process_time() - start) / len(items)
    batch = {name: array.to(arguments.device) for name, array in make_batch(items).items()}
    return task, lambda: task(batch).loss, seconds


def supervised_loss(name: str, network: str, arguments: argparse.Namespace) -> tuple[torch.nn.Module, Callable, float]:
    """A network with nnU-Net's loss."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    planned = plan(network, arguments)
    module = make_network(planned, NUM_LABELS, deep_supervision=True)
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    image = torch.randn(arguments.batch, 1, *planned[1], device=arguments.device)
    with torch.no_grad():
        outputs = module.to(arguments.device)(image)
    if not isinstance(outputs, (list, tuple)):
        label = torch.randint(NUM_LABELS, image.shape, device=arguments.device)
        return module, lambda: loss(module(image), label), 0.0
    shapes = [output.shape[2:] for output in outputs]
    labels = [torch.randint(NUM_LABELS, (*image.shape[:2], *shape), device=arguments.device) for shape in shapes]
    weights = [0.5**level for level in range(len(labels) - 1)] + [0.0]
    deep = DeepSupervisionWrapper(loss, [weight / sum(weights) for weight in weights])
    return module, lambda: deep(module(image), labels), 0.0


if __name__ == "__main__":
    main()
