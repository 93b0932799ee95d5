"""The parts of `benchmarks.assembly`: each is a function of the options that gives rows."""

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhandler as jh
from benchmarks.assembly_models import HIPNN, Network, init, params_from_hippynn
from benchmarks.assembly_peers import (
    FINDERS,
    Hippynn,
    columns,
    crystals,
    g2,
    kernels,
    silicon,
    sk_metrics,
)
from benchmarks.assembly_search import padded, searching
from benchmarks.common import Times, best_of, interleaved, median, ratio, spread

__all__ = ["PARTS", "db_info"]

_LEARNING_RATE = 1e-3
_ROWS = 10_007
_ENERGY = jh.pred("energy"), jh.true("energy")
Rows = list[dict[str, Any]]


def _pairs(options: argparse.Namespace) -> Rows:
    sets = {
        "g2": g2(),
        "metal cells": crystals(32 if options.quick else 512),
        "silicon": silicon(3 if options.quick else 8),
    }
    rows: Rows = []
    for name, (structures, energies) in sets.items():
        database = jh.database(
            columns(structures, energies), splits={"train": range(len(energies))}
        )
        geometry = [(atoms.positions, atoms.cell.array, atoms.pbc) for atoms in structures]
        _check_pairs(database, geometry)
        peers: dict[str, Any] = {
            finder: partial(_find_all, make(Network().cutoff), geometry)
            for finder, make in FINDERS.items()
        }
        peers["search"] = partial(jh.precompute_pairs, database, Network().cutoff)
        peers["packs"] = partial(_search_and_pack, database)
        for peer in peers.values():
            peer()
        times = interleaved(peers, options.rounds)
        bar = f"ours <= {2 if len(structures) == 1 else 1.5} x vesin's"
        cases = [("search", "vesin", ""), ("packs", "vesin", bar)]
        cases += [("packs", finder, "") for finder in FINDERS if finder != "vesin"]
        for ours, finder, wanted in cases:
            what = f"{name}, search{' and packs' if ours == 'packs' else ''}"
            rows.append(_timed(what, times, ours, finder, bar=wanted))
    return rows


def _packing(options: argparse.Namespace) -> Rows:
    rows: Rows = []
    cells = crystals(64 if options.quick else 512)
    for name, (structures, energies) in {"g2": g2(), "metal cells": cells}.items():
        problem = _Problem(structures, energies)
        packs = problem.packs(("atom_mask", "pair_mask"))
        for slots in ("atom", "pair"):
            useful = float(packs[f"{slots}_mask"].mean())
            rows.append(_figure(f"{name}, useful slots for {slots}s", useful, bar=">= 0.8"))
        trainer, state = problem.trainer("loop"), problem.state()
        compiled = 0
        for epoch in range(3):
            source = problem.source(np.random.default_rng(epoch))
            state, info = trainer.train_from_host(state, source)
            compiled += info.report.compiles
        rows.append(_figure(f"{name}, train steps compiled in 3 epochs", compiled, bar="<= 3"))
    return rows


def _epoch(options: argparse.Namespace) -> Rows:
    structures, energies = crystals(32 if options.quick else 512)
    problem = _Problem(structures, energies)
    data = columns(structures, energies)
    bare = jh.database(data, splits={"train": range(len(energies))})
    trainer, state, params = problem.trainer("loop"), problem.state(), problem.params
    rng, reports = np.random.default_rng(0), []

    def cached() -> Any:
        _, info = trainer.train_from_host(state, problem.source(rng))
        reports.append(info.report)

    def on_host() -> Any:
        database = jh.precompute_pairs(bare, Network().cutoff)
        trainer.train_from_host(state, database.source("train", problem.db_info, order=rng))

    batches = padded(structures, energies)
    num_pairs = problem.database.structures.num_pairs
    assert num_pairs is not None
    searcher = searching(problem.model, structures, num_pairs, batch_size=16)
    modules, _ = jh.assemble_for_training(
        jh.losses.mse(*_ENERGY), [], model=searcher, params=params, specs=batches
    )
    inside_trainer = jh.trainer(
        modules.loss, optax.adam(_LEARNING_RATE), batch_size=16, mode="loop"
    )

    def in_step() -> Any:
        inside_trainer.train_from_host(state, batches, shuffle=None)

    peers = {"cached": cached, "in step": in_step, "on host": on_host}
    peers["once"] = lambda: jh.precompute_pairs(bare, Network().cutoff)
    for peer in peers.values():
        peer()
    times = interleaved(peers, options.rounds)
    fetched = np.median([(report.read + report.transfer) / report.total for report in reports])
    predicted = {
        "cached": problem.predict(params),
        "in step": np.asarray(
            jh.calculator(modules.model, batch_size=16).calc(params, batches)["energy"]
        ),
    }
    apart = np.max(np.abs(predicted["cached"] / predicted["in step"] - 1))
    repaid = median(times, "once") / (median(times, "in step") - median(times, "cached"))
    return [
        _timed("pairs precomputed; searched in each step", times, "cached", "in step", bar=">= 2"),
        _timed("pairs precomputed; searched on the host", times, "cached", "on host"),
        _figure("reading and packing, of the epoch", float(fetched), bar="<= 0.1"),
        _figure("epochs until precomputing is repaid", repaid, bar="<= 3"),
        _figure("energies apart, relative", float(apart), bar="<= 1e-6"),
    ]


def _step(options: argparse.Namespace) -> Rows:
    structures, energies = g2()
    epochs = 2 if options.quick else 20
    problem = _Problem(structures, energies)
    make = partial(Hippynn, Network(), structures, energies, learning_rate=_LEARNING_RATE)
    theirs = {
        f"{kernel}{', fused Adam' if fused else ''}": make(kernel=kernel, fused=fused)
        for kernel in kernels()
        for fused in (False, True)
    }
    first = next(iter(theirs.values()))
    params = params_from_hippynn(first.state(), Network())
    every = first.batches([np.arange(len(energies))])[0]
    np.testing.assert_allclose(problem.predict(params), first.energies(every), rtol=1e-4, atol=1e-4)
    assert first.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))

    shuffled = np.random.default_rng(0).permutation(len(energies))
    batches = [shuffled[i : i + 16] for i in range(0, len(energies) - 15, 16)]
    packs = problem.packs(problem.columns)
    num_packs = len(packs["energy"])
    many = {name: np.concatenate([values] * epochs) for name, values in packs.items()}
    peers: dict[str, Any] = {
        # Each its own: hippynn's columns come in another order in each assembly.
        name: partial(peer.train, peer.batches(batches))
        for name, peer in theirs.items()
    }
    for mode in ("scan", "loop"):
        trainer, state = problem.trainer(mode), problem.state(params)
        peers[mode] = partial(
            trainer.train_from_host, state, many, shuffle=None, macrobatch_size=num_packs * epochs
        )
    one, state = problem.trainer("loop"), problem.state(params)
    peers["epoch"] = lambda: one.train_from_host(state, problem.source(np.random.default_rng(0)))
    for peer in peers.values():
        for _ in range(3):
            peer()
    times = interleaved(peers, options.rounds)
    # Per 16 structures: batches of hippynn's are full, packs hold fewer or more.
    per = {name: 1 / len(batches) for name in theirs}
    per |= {name: 16 / (len(energies) * epochs) for name in ("scan", "loop")}
    per["epoch"] = 16 / len(energies)
    times = {name: [each * per[name] for each in found] for name, found in times.items()}
    best, usual = best_of(times, list(theirs)), next(iter(theirs))
    return [
        _timed("g2, 16 structures, scan", times, "scan", best, bar=">= 3"),
        _timed("g2, 16 structures, scan", times, "scan", usual),
        _timed("g2, 16 structures, loop", times, "loop", best),
        _timed("g2, 16 structures, an epoch with packing", times, "epoch", best),
    ]


def _metrics(options: argparse.Namespace) -> Rows:
    rng = np.random.default_rng(0)
    x, params = rng.normal(size=(_ROWS, 8)).astype(np.float32), np.ones(8, np.float32)
    data = {"x": x, "y": (x @ params + rng.normal(size=_ROWS)).astype(np.float32)}
    terms = jh.pred("y"), jh.true("y")
    wanted = {"MSE": jh.losses.mse, "MAE": jh.losses.mae, "RMSE": jh.losses.rmse}
    wanted["R2"] = jh.losses.rsq
    modules, _ = jh.assemble_for_training(
        jh.losses.mse(*terms),
        {name: term(*terms) for name, term in wanted.items()},
        model=lambda params, inputs: {"y": inputs["x"] @ params},
        params=params,
        specs=data,
    )
    found: list[dict[str, float]] = []
    sizes = [(1_000, 10_000)] if options.quick else [(1, 500), (7, 999), (64, 640), (1_000, 10_000)]
    for batch_size, macrobatch_size in [*sizes, (_ROWS, _ROWS)]:
        evaluator = modules.evaluator.with_batch_size(batch_size)
        found.append(evaluator.evaluate(params, data, macrobatch_size=macrobatch_size))
    predicted = np.asarray(modules.model(params, {"x": jnp.array(x)})["y"], np.float64)
    theirs = sk_metrics(predicted, data["y"].astype(np.float64))
    moved = max(abs(each[name] / found[-1][name] - 1) for each in found for name in wanted)
    apart = max(abs(each[name] / theirs[name] - 1) for each in found for name in wanted)
    return [
        _figure("metrics apart, batch sizes 1 to 10,007", moved, bar="<= 1e-6"),
        _figure("metrics apart from scikit-learn's", apart, bar="<= 1e-6"),
    ]


def _assembly(options: argparse.Namespace) -> Rows:
    structures, energies = g2()
    problem = _Problem(structures, energies)

    def assemble() -> Any:
        # Equal models would find each other's traces.
        return problem.assemble(dataclasses.replace(problem.model), forces=True)

    times = interleaved({"assembly": assemble}, 2 if options.quick else 20)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "benchmarks.assembly", "--measure", "db_info"]
    infos: set[str] = set()
    for seed in range(5):
        env = os.environ | {"PYTHONHASHSEED": str(seed)}
        infos.add(subprocess.check_output(command, cwd=root, env=env, text=True).splitlines()[-1])
    slowest = max(times["assembly"]) * 1e3
    return [
        _figure("energy and forces", median(times, "assembly") * 1e3, unit="ms", bar="<= 100"),
        _figure("energy and forces, the slowest of 20", slowest, unit="ms", bar="<= 100"),
        _figure("different db_info under five hash seeds", len(infos), bar="1"),
    ]


def db_info() -> dict[str, Any]:
    """Returns what an assembly of energy and forces reads."""
    structures, energies = g2()
    return _Problem(structures, energies).assemble(None, forces=True)[1]


def _forces(options: argparse.Namespace) -> Rows:
    problem = _Problem(*g2())
    energy, _ = problem.assemble(None, forces=False)
    both, _ = problem.assemble(None, forces=True)
    batch = {name: values[:1] for name, values in problem.packs(problem.columns).items()}
    batch["forces"] = np.zeros_like(batch["positions"])

    def by_hand(params: Any, batch: Mapping[str, Any]) -> Any:
        predicted = problem.model(params, batch)["energy"]
        there = ~jnp.isnan(batch["energy"])
        wrong = jnp.where(there, predicted - jnp.where(there, batch["energy"], 0), 0)
        return jnp.sum(wrong**2) / jnp.sum(there)

    losses = {"assembled": energy.loss, "by hand": by_hand, "with forces": both.loss}
    flops = {name: _flops(loss, problem.params, batch) for name, loss in losses.items()}
    columns = ("flops of a train step", flops["assembled"])
    return [
        _figure(*columns, peer="by hand", theirs=flops["by hand"], bar="ours <= 1.01 x"),
        _figure(*columns, peer="with forces", theirs=flops["with forces"]),
    ]


class _Problem:
    """Structures with their pairs, in packs of about 16; the network, assembled."""

    def __init__(self, structures: Sequence[Any], energies: np.ndarray) -> None:
        splits = {"train": range(len(energies))}
        data = columns(structures, energies)
        data["forces"] = np.zeros_like(data["positions"], np.float32)
        self.database = jh.precompute_pairs(jh.database(data, splits=splits), Network().cutoff)
        self.slots = self.database.packing.structures
        species = tuple(sorted({int(number) for atoms in structures for number in atoms.numbers}))
        self.model = HIPNN(Network(), species, self.slots, self._most_neighbors())
        self.params = init(jax.random.key(0), Network(), len(species))
        self.modules, self.db_info = self.assemble(self.model, forces=False)
        self.columns = self.db_info["inputs"] + self.db_info["targets"]

    def assemble(self, model: Any, *, forces: bool) -> tuple[jh.TrainingModules, dict[str, Any]]:
        error = jh.losses.mse(*_ENERGY)
        if forces:
            error += jh.losses.mse(-jh.gradient("energy", wrt="positions"), jh.true("forces"))
        metrics = {"MSE": error, "MAE": jh.losses.mae(*_ENERGY)}
        given = {"model": model or self.model, "params": self.params, "specs": self.database}
        return jh.assemble_for_training(error, metrics, **given)

    def trainer(self, mode: str) -> jh.Trainer:
        optimizer = optax.adam(_LEARNING_RATE)
        return jh.trainer(self.modules.loss, optimizer, batch_size=1, mode=mode)

    def state(self, params: Any = None) -> jh.TrainState:
        params = self.params if params is None else params
        return self.trainer("loop").init(params, key=jax.random.key(0))

    def _most_neighbors(self) -> int:
        packs = self.packs(("pair_first", "pair_mask"))
        real = zip(packs["pair_first"], packs["pair_mask"], strict=True)
        most = max(int(np.bincount(first[mask]).max()) for first, mask in real)
        return -(-most // 8) * 8

    def source(self, order: np.random.Generator | None = None) -> Any:
        return self.database.source("train", self.db_info, order=order)

    def packs(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        source = self.database.source("train", names)
        return source.read(0, source.num_rows)

    def predict(self, params: Any) -> np.ndarray:
        source = self.source()
        outputs = jax.jit(self.modules.model)(params, source.read(0, source.num_rows))
        return source.unpack({"energy": np.asarray(outputs["energy"])})["energy"]


def _find_all(find: Any, geometry: Sequence[Any]) -> None:
    for positions, cell, pbc in geometry:
        find(positions, cell, pbc)


def _search_and_pack(database: Any) -> Any:
    source = jh.precompute_pairs(database, Network().cutoff).source("train")
    return source.read(0, source.num_rows)


def _check_pairs(database: Any, geometry: Sequence[Any]) -> None:
    """Compares all pairs in packs with ase's."""
    packs, find = _search_and_pack(database), FINDERS["ase"](Network().cutoff)
    names = ("pair_first", "pair_second", "pair_structure")
    real = packs["pair_mask"]
    for number, (positions, cell, pbc) in enumerate(geometry):
        pack, slot = np.argwhere(packs["structure_index"] == number)[0]
        mine = real[pack] & (packs["pair_structure"][pack] == slot)
        start = int(np.argmax(packs["atom_structure"][pack] == slot))
        first, second, _ = (packs[name][pack][mine] for name in names)
        ours = np.column_stack([first - start, second - start, packs["pair_shift"][pack][mine]])
        theirs = np.column_stack(find(positions, cell, pbc))
        ours, theirs = (np.unique(each.astype(int), axis=0) for each in (ours, theirs))
        if len(ours) != mine.sum() or not np.array_equal(ours, theirs):
            raise RuntimeError(f"structure {number} has other pairs than ase finds")


def _flops(loss: Any, params: Any, batch: Any) -> float:
    def mean(params: Any, batch: Any) -> Any:
        found = loss(params, batch)
        return found.total / found.count if isinstance(found, jh.Mean) else found

    compiled = jax.jit(jax.value_and_grad(mean)).lower(params, batch).compile()
    analysis: Any = compiled.cost_analysis()
    return float(analysis["flops"])


def _timed(what: str, times: Times, ours: str, peer: str, *, bar: str = "") -> dict[str, Any]:
    over = (ours, peer) if bar.startswith("ours") else (peer, ours)
    return {
        "what": what,
        "jaxhandler": median(times, ours) * 1e3,
        "peer": peer,
        "peer's": median(times, peer) * 1e3,
        "unit": "ms",
        "ratio": ratio(times, *over),
        "bar": bar,
        "quartiles": {"ratio": spread(times, *over)},
    }


def _figure(
    what: str,
    value: float,
    *,
    peer: str = "",
    theirs: float | str = "",
    unit: str = "",
    bar: str = "",
) -> dict[str, Any]:
    relative = {"ratio": value / theirs} if isinstance(theirs, float) else {}
    found = {"what": what, "jaxhandler": value, "peer": peer, "peer's": theirs, "unit": unit}
    return found | relative | {"bar": bar}


PARTS = {
    "pairs": _pairs,
    "packing": _packing,
    "epoch": _epoch,
    "step": _step,
    "metrics": _metrics,
    "assembly": _assembly,
    "forces": _forces,
}
"""The parts by name."""
