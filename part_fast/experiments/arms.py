"""Arms of an experiment: runs that differ in a few fields, with several seeds, and a small file of results of each one.

The files are all that a comparison needs: it goes on from them on another day, when the weights are gone.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from part_fast.attacks.catalogue import attack_of_evaluation, load_attacks
from part_fast.config import TrainConfig
from part_fast.errors import BadValueError
from part_fast.evaluation.accuracy import accuracy, evaluate
from part_fast.experiments.compare import interval, is_correct, mean_and_spread, seed_variance
from part_fast.reading import missing_or_wrong, read_json
from part_fast.report import files
from part_fast.report.environment import environment
from part_fast.training.loop import train
from part_fast.training.run_folder import WEIGHTS, begun_or_not

# What is measured, by its name in `evaluate`: of every arm, and of some, on a subset, since it takes so long.
MEASURES = {"natural": "natural", "pgd20": "PGD-20", "aa": "AutoAttack"}
ACCURACIES = ("natural", "pgd20")
AUTOATTACK, AUTOATTACK_IMAGES = "aa", 1000
# Seeds from which on a difference's own variance over them is taken.
OWN_SEEDS = 3
# Fields that say where and from what files a run was made, which differ from machine to machine.
PLACES = ("preset", "root", "download", "device", "init")


@dataclass(frozen=True)
class Result:
    """What an arm came to with one seed.

    config: that of the run, without `PLACES`. warmup: SHA-256 of the weights that it began with, None for random ones.
    rows: of metrics.csv, a row per epoch. tested: eps and alpha of the tests. correct: attack -> bool (N,), whether
    each test image was right; of the averaged weights where there are some. environment: what it ran on.
    """

    arm: str
    config: Mapping[str, Any]
    warmup: str | None
    rows: Sequence[Mapping[str, Any]]
    tested: Mapping[str, float]
    correct: Mapping[str, Tensor]
    environment: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def seconds(self) -> float:
        """Of training, tests left out."""
        return float(sum(row["seconds"] for row in self.rows))

    def accuracy(self, measure: str) -> float:
        return float(self.correct[measure].double().mean())

    def file(self, folder: Path) -> Path:
        return folder / f"{slug(self.arm)}-seed{self.seed}.json"

    def write(self, folder: Path) -> None:
        files.write_json(
            self.file(folder),
            {
                "arm": self.arm,
                "config": dict(self.config),
                "warmup": self.warmup,
                "tested": dict(self.tested),
                "results": {
                    name: {
                        **accuracy(right),
                        "images": base64.b64encode(numpy.packbits(right.numpy()).tobytes()).decode(),
                    }
                    for name, right in self.correct.items()
                },
                "rows": list(self.rows),
                "environment": dict(self.environment),
            },
        )


def slug(arm: str) -> str:
    """The arm's part in names of files."""
    return re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")


def read_result(path: Path) -> Result:
    """Errors: ValueError that names the file where it is not what `Result.write` writes."""
    record = read_json(path)
    try:
        correct = {}
        for name, row in record["results"].items():
            attack_of_evaluation(name)
            bits = numpy.unpackbits(numpy.frombuffer(base64.b64decode(row["images"], validate=True), numpy.uint8))
            if not 0 <= len(bits) - row["n"] < 8:
                raise BadValueError(f"{name!r} has {len(bits)} images, not {row['n']}")
            correct[name] = torch.from_numpy(bits[: row["n"]].copy()).bool()
            if {**accuracy(correct[name]), "images": row["images"]} != row:
                raise BadValueError(f"the accuracy under {name!r} is not that of its images")
        tested = {name: float(record["tested"][name]) for name in ("eps", "alpha")}
        result = Result(
            record["arm"], record["config"], record["warmup"], record["rows"], tested, correct, record["environment"]
        )
        if result.file(path.parent) != path or not result.seconds >= 0:
            raise BadValueError(f"it is of arm {result.arm!r}, seed {result.seed}")
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, ValueError, binascii.Error) as error:
        raise BadValueError(f"{path} is no result of an experiment: {missing_or_wrong(error)}") from error
    return result


def read_results(folder: Path, arms: Collection[str]) -> list[Result]:
    """All results in `folder` of these arms, in their order and that of the seeds. Errors: as `read_result`."""
    found = [read_result(path) for path in sorted(folder.glob("*-seed*.json"))]
    order = list(arms)
    return sorted((one for one in found if one.arm in order), key=lambda one: (order.index(one.arm), one.seed))


def train_arms(
    out: Path,
    kept: Path,
    config: TrainConfig,
    arms: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    autoattack: Collection[str] = (),
    prepare: Callable[[TrainConfig, Path], TrainConfig] = lambda config, warm: config,
    log: Callable[[str], None] = print,
) -> None:
    """Train and test every arm with every seed that has no result in `kept` yet.

    config.warmup_epochs of AT come first, once for each seed, and all its arms go on from there for the rest of
    config.epochs. arms: name -> the fields of `config` that it changes. autoattack: the arms that are tested by it
    too. prepare: what is done for an arm after the warm-up in that folder, before it is trained; gives its
    configuration.
    Run folders are in `out`, and may be removed once their results are written. All arms are tested with the eps and
    the alpha of `config`, whatever they are trained with.

    Errors: ValueError where a result is of another configuration or other tests; what `train` and `evaluate` raise.
    """
    load_attacks([AUTOATTACK] if autoattack else [])  # a missing package is said before anything is written
    plans = {(name, seed): _plan(config, changes, seed) for seed in seeds for name, changes in arms.items()}
    missing = {
        (name, seed): plan
        for (name, seed), plan in plans.items()
        if not has_result(kept, name, plan, how_tested(config), [*MEASURES] if name in autoattack else ACCURACIES)
    }
    for seed in seeds:
        warm = out / f"warmup-seed{seed}"
        if config.warmup_epochs and any(of == seed for _, of in missing):
            log(f"warm-up, seed {seed}")
            _train(dataclasses.replace(config, method="at", epochs=config.warmup_epochs, seed=seed), warm)
        for name in arms:
            if (name, seed) not in missing:
                continue
            log(f"{name}, seed {seed}")
            plan, folder = missing[name, seed], out / f"{slug(name)}-seed{seed}"
            begun = None
            if config.warmup_epochs:
                begun = hashlib.sha256((warm / WEIGHTS).read_bytes()).hexdigest()
                plan = dataclasses.replace(plan, init=str(warm / WEIGHTS))
            rows = _train(prepare(plan, warm), folder)
            correct = _tested(folder, config, plan, name in autoattack)
            kept.mkdir(parents=True, exist_ok=True)
            Result(name, _identity(plan), begun, rows, how_tested(config), correct, _short(environment())).write(kept)


def _plan(config: TrainConfig, changes: Mapping[str, Any], seed: int) -> TrainConfig:
    """An arm's configuration, but for the file of the weights that it begins with."""
    config = dataclasses.replace(config, seed=seed)
    if config.warmup_epochs:
        config = config.after_warmup(Path(), init=None)
    return dataclasses.replace(config, **changes)


def _identity(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_json().items() if name not in PLACES}


def how_tested(config: TrainConfig) -> dict[str, Any]:
    """What all arms of `config` are tested with."""
    return {"eps": config.eps, "alpha": config.alpha}


def has_result(kept: Path, arm: str, plan: TrainConfig, tested: Mapping[str, float], measures: Sequence[str]) -> bool:
    """Whether `kept` holds a result of the arm with the seed of `plan` that has all these measures.

    A field that its configuration lacks, since it is older than the field, has its default there.
    Errors: ValueError where it is of another configuration or of other tests, and as `read_result`.
    """
    path = kept / f"{slug(arm)}-seed{plan.seed}.json"
    if not path.is_file():
        return False
    result, now = read_result(path), _identity(plan)
    there = _identity(TrainConfig()) | dict(result.config)
    different = [name for name in {**now, **there} if now.get(name) != there.get(name)]
    if different:
        before, after = ({name: of.get(name) for name in different} for of in (there, now))
        raise BadValueError(f"{path} has another configuration: {before} there, {after} here")
    if result.tested != tested:
        raise BadValueError(f"{path} was tested otherwise: {dict(result.tested)} there, {dict(tested)} here")
    return all(name in result.correct for name in measures)


def _train(config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    resume, overwrite = begun_or_not(folder)
    return train(config, folder, resume=resume, overwrite=overwrite)


def _tested(folder: Path, config: TrainConfig, plan: TrainConfig, autoattack: bool) -> dict[str, Tensor]:
    """Whatever eps and alpha the arm trained with, all are tested with the same."""
    weights = "last" if plan.averaging[0] == "none" else "averaged"
    asked: dict[str, Any] = {"model": config.model, "weights": weights, "device": config.device, "resume": True}
    asked |= how_tested(config)
    evaluate(folder, ACCURACIES, **asked)
    correct = {name: is_correct(folder, name) for name in ACCURACIES}
    if autoattack:
        few = folder / "autoattack"
        evaluate(folder, [AUTOATTACK], n=min(AUTOATTACK_IMAGES, len(correct["natural"])), out=few, **asked)
        correct[AUTOATTACK] = is_correct(few, AUTOATTACK)
    return correct


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of a result wants to know of the machine."""
    return {name: record[name] for name in ("part_fast", "commit", "torch", "cpu", "gpus", "threads")}


def measured(results: Sequence[Result]) -> dict[str, str]:
    """The measures that some result has, and what they are called."""
    return {key: title for key, title in MEASURES.items() if any(key in result.correct for result in results)}


def summary(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """arm -> seeds, how many; and, of each measure that any of its results has, mean and spread over the seeds that
    have it, and how many these are."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(result.arm for result in results):
        of_arm = [result for result in results if result.arm == name]
        values = {key: [one.accuracy(key) for one in of_arm if key in one.correct] for key in measured(of_arm)}
        found[name] = {"seeds": len(of_arm), **{key: over_seeds(value) for key, value in values.items()}}
    return found


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """`compare.mean_and_spread`, and of how many seeds."""
    return {**mean_and_spread(values), "seeds": len(values)}


def summary_table(found: Mapping[str, Mapping[str, Any]], measures: Mapping[str, str]) -> str:
    """`summary` as text."""
    rows = [
        (name, str(by["seeds"]), *(percent(by.get(key), by["seeds"]) for key in measures)) for name, by in found.items()
    ]
    return files.table(("arm", "seeds", *(f"{title} %" for title in measures.values())), rows)


def percent(value: Mapping[str, Any] | None, seeds: int) -> str:
    """A mean and its spread over seeds, in %, by `over_seeds`; with their number where that is not `seeds`."""
    if value is None:
        return "-"
    spread = f" ± {100 * value['spread']:.2f}" if value["seeds"] > 1 else ""
    return f"{100 * value['mean']:.2f}{spread}" + (f" (n={value['seeds']})" if value["seeds"] != seeds else "")


def differences(results: Sequence[Result], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each pair (before, after) of arms and each measure that some seed of both has, from one warm-up.

    With `OWN_SEEDS` seeds or more the variance over seeds is the difference's own; with fewer that of all results
    (`compare.seed_variance`), which holds if arms scatter alike, so that nothing is called significant by it. A measure
    without enough results for that has no such rows.

    Returns: difference, "after - before"; measure; seeds, those that both have; and what `compare.interval` gives,
        corrected for as many comparisons as there are rows.
    """
    of = {key: {(one.arm, one.seed): one for one in results if key in one.correct} for key in measured(results)}
    pooled = {key: seed_variance({run: one.accuracy(key) for run, one in found.items()}) for key, found in of.items()}
    rows = []
    for before, after in pairs:
        for key, found in of.items():
            both = [seed for arm, seed in found if arm == before and (after, seed) in found]
            seeds = [seed for seed in both if found[before, seed].warmup == found[after, seed].warmup]
            if seeds and (pooled[key].degrees or len(seeds) >= OWN_SEEDS):
                rows.append((before, after, key, seeds))
    compared = []
    for before, after, key, seeds in rows:
        enough = len(seeds) >= OWN_SEEDS
        first, second = ([of[key][arm, seed].correct[key] for seed in seeds] for arm in (before, after))
        row = interval(first, second, len(rows), None if enough else pooled[key])
        row["significant"] = row["significant"] and enough
        compared.append({"difference": f"{after} - {before}", "measure": key, "seeds": seeds, **row})
    return compared


def checked_results(kept: Path, config: TrainConfig, arms: Mapping[str, Mapping[str, Any]]) -> list[Result]:
    """`read_results` of arms of `config`.

    Errors: ValueError where one is of another configuration, also one that is not trained now, or of other tests.
    """
    results = read_results(kept, arms)
    for one in results:
        has_result(kept, one.arm, _plan(config, arms[one.arm], one.seed), how_tested(config), ())
    return results


def other_warmups(results: Sequence[Result]) -> list[str]:
    """A line for each seed whose arms did not begin with the same weights, as where the warm-up was trained anew."""
    lines = []
    for seed in sorted({one.seed for one in results}):
        begun: dict[str | None, list[str]] = {}
        for one in results:
            if one.seed == seed:
                begun.setdefault(one.warmup, []).append(one.arm)
        if len(begun) > 1:
            groups = "; ".join(", ".join(names) for names in begun.values())
            lines.append(f"seed {seed} has {len(begun)} warm-ups, which are not paired with each other: {groups}")
    return lines
