"""`part-fast report`: one HTML page about run folders, made of nothing but their files; what is missing is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from part_fast import checks
from part_fast.errors import BadValueError, MissingPackageError
from part_fast.evaluation.accuracy import images_sha256
from part_fast.evaluation.sweep import STEPS_OVER_EPS
from part_fast.experiments.compare import difference, interval, load_student_t, mean_and_spread
from part_fast.experiments.runs import Group, Run, differing_fields, find_runs, group_runs
from part_fast.methods import METHODS
from part_fast.reading import read_tensors
from part_fast.report.charts import Series, key, line_chart
from part_fast.report.page import Chart, MaskGrid, Picture, Section, Table, mask_picture, picture, write_page
from part_fast.training.mask_history import MaskHistory, pair_of
from part_fast.training.run_folder import WEIGHTS

# Over the columns of a mask grid, unless epochs are asked for; rows of it, so that many runs show fewer images.
EPOCHS, ROWS = 7, 24
# Columns of metrics.csv with a curve: title, unit, and the factor to it.
CURVES = {
    "test_natural": ("Natural test accuracy", "accuracy (%)", 100),
    "test_pgd20": ("PGD-20 test accuracy", "accuracy (%)", 100),
    "averaged_natural": ("Natural test accuracy of the averaged weights", "accuracy (%)", 100),
    "averaged_pgd20": ("PGD-20 test accuracy of the averaged weights", "accuracy (%)", 100),
    "train_robust": ("Training accuracy under attack", "accuracy (%)", 100),
    "train_loss": ("Training loss", "loss (nats)", 1),
}
# Environment records and configurations hold more, which says nothing about how a run came out.
ENVIRONMENT = ("part_fast", "commit", "python", "torch", "cuda", "system", "cpu", "cpu_capability", "threads", "gpus")
IN_255 = ("eps", "eps_low", "alpha")


class Tested(NamedTuple):
    """Evaluations of one group by the same settings, and of the same kind of weights: a row of the results."""

    group: Group
    settings: tuple[Any, ...]
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        weights = self.settings[-1]
        return self.group.name if weights == WEIGHTS else f"{self.group.name}, {weights}"


def report(
    folders: Sequence[Path], out: Path, *, mask_epochs: Sequence[int] = (), overwrite: bool = False
) -> dict[str, Any]:
    """Write a page about the runs in `folders` to `out`, an .html file that needs no other one and no network.

    folders: run folders, or folders that hold some, such as those of demo, study and reproduce. Runs that differ in
    their seed alone are a group, of which means and spreads are shown. mask_epochs: those that the mask grids show,
    counted from 1, and warned of where no run has them; default: at most seven, evenly spaced. The same files give the
    same page.

    Returns: "warnings", as the page has them; "groups", their names; "runs", how many.

    Raises:
        FileNotFoundError: a folder is not there, or holds no run.
        ValueError: a file of a run cannot be read; or `out` is no .html file, or exists, not overwrite.
    """
    if out.suffix != ".html":
        raise BadValueError(f"out takes an .html file, got {str(out)!r}")
    if out.exists() and not overwrite:
        raise BadValueError(f"{out} exists: choose another --out or --overwrite")
    for epoch in mask_epochs:
        checks.count("mask_epochs", epoch, 1)
    runs = find_runs(folders)
    groups = group_runs(runs)
    page = _Page(groups, _starts(runs))
    sections = [
        page.results(),
        page.curves(),
        page.masks(sorted(set(mask_epochs))),
        page.robustness(),
        page.speed(),
        page.configuration(),
        page.environment(),
        page.list_of_runs(),
    ]
    names = " and ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, f"part_fast report: {names}", _summary(groups), page.warnings, sections)
    return {"warnings": page.warnings, "groups": [group.name for group in groups], "runs": len(runs)}


def _starts(runs: Sequence[Run]) -> dict[Path, Run | None]:
    """For each run's folder the run on the page that left the weights which it starts from.

    None where there is none, and where the way back comes to the run itself, as if one of two was trained anew.
    """
    before = {
        run.folder: next((other for other in runs if other is not run and run.starts_from(other)), None) for run in runs
    }
    found = dict(before)
    for folder in before:
        way = [folder]
        while (start := before[way[-1]]) is not None and start.folder not in way:
            way.append(start.folder)
        if start is not None and start.folder == folder:
            found[folder] = None
    return found


def _summary(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    data, models = (
        " and ".join(dict.fromkeys(str(getattr(run.config, field)) for run in runs)) for field in ("dataset", "model")
    )
    many = f"{len(runs)} runs in {_plural(len(groups), 'group')}" if len(runs) > 1 else "One run"
    return f"{many}: {', '.join(group.name for group in groups)}. Images: {data}. Network: {models}."


class _Page:
    """The sections, from the top of the page to its end; each adds what it finds wrong to `warnings`.

    before: for each run's folder, the run on the page that it starts from.
    """

    def __init__(self, groups: Sequence[Group], before: Mapping[Path, Run | None]) -> None:
        self.groups, self.before = groups, before
        self.warnings: list[str] = []
        self.places = {group.name: place for place, group in enumerate(groups)}
        for group in groups:
            self._check(group)

    def _check(self, group: Group) -> None:
        for run in group.runs:
            done, wanted = len(run.rows), run.config.epochs
            if done < wanted:
                self.warnings.append(f"{_folder(run)} is not finished: {done} of {wanted} epochs.")
            if run.evaluation is None and not self._leads_on(run):
                self.warnings.append(f"{_folder(run)} is not evaluated: part-fast evaluate.")
            for what, record in (("evaluation", run.evaluation), ("sweep", run.sweep)):
                if record is not None and not run.holds(record):
                    self.warnings.append(
                        f"The {what} of {_folder(run)} is of other weights than the folder holds, and is left out."
                    )
            if run.evaluation is not None and run.holds(run.evaluation):
                self.warnings += [f"{_folder(run)}: {said}." for said in run.evaluation["warnings"]]
                if run.evaluation["eps"] != run.config.eps:
                    self.warnings.append(
                        f"{_folder(run)} was trained with eps {_in_255(run.config.eps)} and evaluated with "
                        f"{_in_255(run.evaluation['eps'])}."
                    )
            swept = run.sweep["curves"] if run.sweep is not None and run.holds(run.sweep) else {}
            for curve in swept.values():
                self.warnings += [f"{_folder(run)}, sweep: {said}." for said in curve["warnings"]]
            if run.masks is not None and tuple(run.masks.eps.tolist()) != pair_of(run.config):
                kept = " and ".join(_in_255(eps) for eps in run.masks.eps.tolist())
                self.warnings.append(f"The masks of {_folder(run)} are of another eps, {kept}, and are left out.")
        seeds = [run.config.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            self.warnings.append(f"{group.name} has a seed twice ({_listed(seeds)}): its spread is not one over seeds.")

    def _leads_on(self, run: Run) -> bool:
        """Whether another run on the page starts from this one, as from a warm-up."""
        return any(other is run for other in self.before.values())

    # --- accuracies ---------------------------------------------------------------------------------------------------

    def results(self) -> Section:
        rows = self._tested()
        if not rows:
            return Section("results", "Results", ["No run of these is evaluated: part-fast evaluate RUN does that."])
        attacks = list(dict.fromkeys(name for row in rows for run in row.runs for name in _results(run)))
        cells = []
        for row in rows:
            found = [[100 * _results(run)[a]["accuracy"] for run in row.runs if a in _results(run)] for a in attacks]
            shown = [_mean(values, len(row.runs)) if values else "not measured" for values in found]
            _, eps, alpha, n, _, _ = row.settings
            seeds = _listed([run.config.seed for run in row.runs])
            cells.append((row.name, seeds, *shown, _in_255(eps), _in_255(alpha), str(n)))
        table = Table(
            "Accuracy on test images in %: mean ± sample standard deviation over seeds; of a single seed, the value.",
            ("run", "seeds", *(f"{attack} %" for attack in attacks), "eps", "alpha", "images"),
            cells,
        )
        if len({row.settings[:-1] for row in rows}) > 1:
            self.warnings.append("Evaluations have different settings: accuracies of different rows do not compare.")
        missing = [group.name for group in self.groups if not any(row.group is group for row in rows)]
        says = [f"Without an evaluation: {', '.join(missing)}."] if missing else []
        differences, said = self._differences(rows, attacks)
        return Section("results", "Results", [*says, *said], [table, *differences])

    def _tested(self) -> list[Tested]:
        found: dict[tuple[str, tuple[Any, ...]], list[Run]] = {}
        for group in self.groups:
            for run in group.runs:
                record = run.evaluation
                if record is None or not run.holds(record):
                    continue
                weights = run.weights[record["sha256"]]
                settings = tuple(record[name] for name in ("dataset", "eps", "alpha", "n", "seed"))
                found.setdefault((group.name, (*settings, weights)), []).append(run)
        by_name = {group.name: group for group in self.groups}
        return [Tested(by_name[name], settings, runs) for (name, settings), runs in found.items()]

    def _differences(self, rows: Sequence[Tested], attacks: Sequence[str]) -> tuple[list[Table], list[str]]:
        """A table of what each row has above the first one of a plain method, paired by seed and image."""
        plain = [row for row in rows if not METHODS[row.group.config.method].weighted]
        base = (plain or rows)[0]
        pairs, unpaired = [], []
        for row in rows:
            if row is base:
                continue
            both = {run.config.seed: run for run in base.runs}
            of = {run.config.seed: run for run in row.runs}
            seeds = [seed for seed in of if seed in both]
            hits = [(_hits(both[seed]), _hits(of[seed])) for seed in seeds]
            twice = len(both) < len(base.runs) or len(of) < len(row.runs)  # and nobody knows which of them is meant
            alike = row.settings[:-1] == base.settings[:-1] and all(_paired(*pair) for pair in hits)
            if twice or not alike or not hits:
                unpaired.append(row.name)
                continue
            shared = [a for a in attacks if all(a in one and a in other for one, other in hits)]
            pairs += [(row, a, [one[a] for one, _ in hits], [other[a] for _, other in hits]) for a in shared]
        says = []
        if unpaired:
            says.append(
                f"Not compared with {base.name}, for want of the same seeds, each once, the same settings or the file "
                f"that says which images were right: {', '.join(unpaired)}."
            )
        if not pairs:
            return [], says
        try:
            load_student_t()
        except MissingPackageError as error:
            return [], [*says, f"Differences with their intervals are left out: {error}."]
        cells: list[tuple[str, ...]] = []
        for row, attack, before, after in pairs:
            points = (f"{row.name} - {base.name}", attack)
            if len(before) < 2:
                found = difference(before, after)
                images = f"± {200 * found['standard_error']:.2f} by the images alone"
                cells.append((*points, "1", f"{100 * found['mean']:+.2f}", images, "unknown", "unknown: one seed"))
                continue
            found = interval(before, after, len(pairs))
            widths = (f"± {100 * found[name]:.2f}" for name in ("half_width", "half_width_all"))
            says_so = "yes" if found["significant"] else "no"
            cells.append((*points, str(len(before)), f"{100 * found['mean']:+.2f}", *widths, says_so))
        caption = (
            "Differences in points, of the seeds that both have, paired by seed and test image. 95 %: the interval of "
            "this difference alone, by its own variance; for all: one that holds for every line at once (Bonferroni), "
            "which must exclude 0 to exceed chance."
        )
        header = ("difference", "attack", "seeds", "points", "95 %", f"95 % for all {len(pairs)}", "exceeds chance")
        return [Table(caption, header, cells)], says

    # --- epochs -------------------------------------------------------------------------------------------------------

    def curves(self) -> Section:
        charts, unmeasured = [], []
        for column, (title, unit, factor) in CURVES.items():
            found = {}
            for group in self.groups:
                lines = [self._line(run, column, factor) for run in group.runs]
                if any(lines):
                    found[group.name] = lines
            if found:
                charts.append(self._chart(title, "epoch", unit, found))
            elif not column.startswith("averaged"):
                unmeasured.append(title)
        says = ["Thick: mean over the seeds, as far as all of them are; thin: single seeds."]
        if any(run is not None for run in self.before.values()):
            says.append("Epochs are counted from the start of the run whose weights a run starts from.")
        if unmeasured:
            says.append(f"Not measured in training: {', '.join(unmeasured)}.")
        if not charts:
            return Section("training", "Training", ["No run has finished an epoch."])
        return Section("training", "Training", says, charts=charts, legend=self._legend())

    def _line(self, run: Run, column: str, factor: float) -> list[tuple[float, float]]:
        """(epoch, value) of a run, from where the run that it starts from ends."""
        start = self._start(run)
        values = [(row["epoch"], row.get(column)) for row in run.rows]
        before = self.before[run.folder]
        if before is not None and before.rows and values:
            values = [(0, before.rows[-1].get(column)), *values]
        return [(start + epoch, factor * value) for epoch, value in values if value is not None]

    def _start(self, run: Run) -> int:
        before = self.before[run.folder]
        return 0 if before is None else self._start(before) + len(before.rows)

    def _chart(
        self,
        title: str,
        x_label: str,
        y_label: str,
        found: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
        even: bool = False,
    ) -> Chart:
        """found: name of a group, with or without more words after a comma -> (x, y) of each seed."""
        series, cells = [], []
        xs = sorted({x for lines in found.values() for line in lines for x, _ in line})
        for name, lines in found.items():
            values = [dict(line) for line in lines]
            all_there = [x for x in xs if all(x in line for line in values)]
            points = [(x, sum(line[x] for line in values) / len(values)) for x in all_there]
            thin = [line for line in lines if line] if len(lines) > 1 else []
            series.append(Series(name, self.places[name], points, thin))
            row = []
            for x in xs:
                here = [line[x] for line in values if x in line]
                row.append(_mean(here, len(values)) if here else "")
            cells.append((name, *row))
        numbers = Table(
            f"{title}: {y_label} over {x_label}; mean ± sample standard deviation over the seeds.",
            ("run", *(f"{x:.4g}" for x in xs)),
            cells,
        )
        return Chart(title, y_label, line_chart(title, x_label, y_label, series, even=even), numbers)

    def _legend(self, names: Sequence[str] = ()) -> list[tuple[str, str]]:
        return [(key(place), name) for name, place in self.places.items() if not names or name in names]

    def masks(self, asked: Sequence[int]) -> Section:
        """A grid for each set of test images, of the first run with masks of every group."""
        histories: dict[str, tuple[MaskHistory, Mapping[int, str]]] = {}
        without = []
        for group in self.groups:
            run = next((run for run in group.runs if self._history(run) is not None), None)
            if run is None:
                without.append(group.name)
            elif not all(self._leads_on(run) for run in group.runs):  # whose masks stand before those that follow
                control = run.config.mask_control
                before = "" if control == "none" else f", before control {control}"
                seeds = f", seed {run.config.seed}" if len(group.runs) > 1 else ""
                histories[f"{group.name}{seeds}{before}"] = (self._history(run), self._methods(run))  # type: ignore[assignment]
        says = [f"No masks over epochs in the folder: {', '.join(without)}."] if without else []
        kept = {epoch for history, _ in histories.values() for epoch in history.epochs.tolist()}
        if absent := [epoch for epoch in asked if epoch not in kept]:
            self.warnings.append(f"No run here has masks of epoch {_listed(absent)}.")
        grids = []
        while histories:
            first = next(iter(histories.values()))[0].images
            same = {name: value for name, value in histories.items() if torch.equal(value[0].images, first)}
            histories = {name: value for name, value in histories.items() if name not in same}
            grids.append(_grid(same, asked))
        return Section("masks", "Masks over epochs", says, grids=grids)

    def _history(self, run: Run) -> MaskHistory | None:
        """The masks of a run, after those of the run that it starts from, if they are of the same images."""
        own = run.masks
        if own is None or tuple(own.eps.tolist()) != pair_of(run.config):
            return None
        start = self._start(run)
        own = own._replace(epochs=own.epochs + start)
        before = self.before[run.folder]
        earlier = None if before is None else self._history(before)
        if earlier is None or not torch.equal(earlier.images, own.images):
            return own
        if earlier.weights.shape[1:] != own.weights.shape[1:]:
            return own
        return own._replace(
            epochs=torch.cat([earlier.epochs, own.epochs]), weights=torch.cat([earlier.weights, own.weights])
        )

    def _methods(self, run: Run) -> dict[int, str]:
        """The method that trained each epoch, by its number."""
        before, start = self.before[run.folder], self._start(run)
        earlier = {} if before is None else self._methods(before)
        return earlier | {start + int(row["epoch"]): row["method"] for row in run.rows}

    # --- strength of the attack ---------------------------------------------------------------------------------------

    def robustness(self) -> Section:
        charts, settings = [], set()
        without = []
        for group in self.groups:
            swept = [run for run in group.runs if run.sweep is not None and run.holds(run.sweep)]
            settings |= {tuple(run.sweep[name] for name in ("eps", "alpha", "n")) for run in swept if run.sweep}
            if not swept and not all(self._leads_on(run) for run in group.runs):
                without.append(group.name)
        for kind, title, label, unit in (
            ("eps", f"PGD-{STEPS_OVER_EPS}, over eps", "eps (1/255)", 255),
            ("steps", "PGD, over steps", "steps", 1),
        ):
            found = {}
            for group in self.groups:
                curves = [
                    [(round(unit * p[kind], 6), 100 * p["accuracy"]) for p in run.sweep["curves"][kind]["points"]]
                    for run in group.runs
                    if run.sweep is not None and run.sweep["sha256"] in run.weights and kind in run.sweep["curves"]
                ]
                if curves:
                    found[group.name] = curves
            if found:
                charts.append(self._chart(title, label, "accuracy (%)", found, even=True))
        says = []
        if charts:
            described = "; ".join(
                f"eps {_in_255(eps)}, alpha {_in_255(alpha)}, {n} images" for eps, alpha, n in sorted(settings)
            )
            says.append(
                f"Settings: {described}. Over eps the step size grows with it. The measured points stand side by side, "
                "whatever lies between them. A sound attack finds ever more as it grows, and everything in the end."
            )
            if len(settings) > 1:
                self.warnings.append("Sweeps have different settings: their curves do not compare.")
        if without:
            says.append(f"Not swept: {', '.join(without)}. part-fast evaluate RUN --sweep eps,steps does that.")
        legend = self._legend() if charts else []
        return Section("robustness", "Robustness as the attack grows", says, charts=charts, legend=legend)

    # --- what it took, and how it was done ----------------------------------------------------------------------------

    def speed(self) -> Section:
        cells = []
        for group in self.groups:
            found = [run for run in group.runs if run.rows]
            speeds = [_average(run, "images_per_second") for run in found]
            epochs = [_average(run, "seconds") for run in found]
            whole = [sum(row["seconds"] or 0 for row in run.rows) for run in found]
            tests = [
                sum(row["seconds"] for row in run.evaluation["results"].values())
                for run in found
                if run.evaluation is not None and run.holds(run.evaluation)
            ]
            columns = [(speeds, ".0f"), (epochs, ".1f"), (whole, ".1f"), (tests, ".1f")]
            cells.append((group.name, *(_mean(values, len(group.runs), how) or "-" for values, how in columns)))
        table = Table(
            "Images per second and seconds of training, tests after epochs not included: mean ± sample standard "
            "deviation over the seeds.",
            ("run", "images/s", "s per epoch", "training, s", "evaluation, s"),
            cells,
        )
        says = []
        if len(self._environments()) > 1:
            says.append("Runs differ in their environment, below: their times do not compare.")
        return Section("speed", "Speed", says, [table])

    def configuration(self) -> Section:
        names = [field.name for field in dataclasses.fields(self.groups[0].config)]
        configs = [group.config for group in self.groups]
        different = differing_fields(configs)
        own = [("seed", *(_listed([run.config.seed for run in group.runs]) for group in self.groups))]
        if any(run.config.init for group in self.groups for run in group.runs):
            starts = [_unique(_plain(run.config.init) for run in group.runs) for group in self.groups]
            own.append(("init", *map(_listed, starts)))
        of_runs = [[run.config for run in group.runs] for group in self.groups]
        rows = [
            (name, *(_listed(_unique(_written(name, getattr(config, name)) for config in group)) for group in of_runs))
            for name in different
        ]
        same = [(name, _written(name, getattr(configs[0], name))) for name in names if name not in different]
        same = [row for row in same if row[0] not in ("seed", "init", "root", "download", "device")]
        header = ("", *(group.name for group in self.groups))
        tables = [
            Table(
                "What differs between the groups." if rows else "Nothing differs but what is below.",
                header,
                [*rows, *own],
                differing=range(len(rows)),
                numbers=False,
            )
        ]
        folded = [Table("What is the same in all", ("", "all"), same, numbers=False)]
        return Section("configuration", "Configuration", tables=tables, folded=folded)

    def environment(self) -> Section:
        found = self._environments()
        if not found:
            return Section("environment", "Environment", ["No folder holds an environment.json."])
        rows = []
        for name in ENVIRONMENT:
            rows.append((name.replace("_", " "), *(_plain(record.get(name)) for record, _ in found)))
        backends = [record.get("backends") for record, _ in found]
        rows.append(("backends", *(_plain(value) for value in backends)))
        differing = [i for i, row in enumerate(rows) if len(set(row[1:])) > 1]
        header = ("", *(_listed(names) for _, names in found)) if len(found) > 1 else ("", "all")
        if differing:
            which = ", ".join(rows[i][0] for i in differing)
            self.warnings.append(f"Runs and evaluations differ in their environment: {which}.")
        without = [_folder(run) for group in self.groups for run in group.runs if run.environment is None]
        says = [f"Without an environment.json: {', '.join(without)}."] if without else []
        table = Table("What training and evaluation ran on.", header, rows, differing, numbers=False)
        return Section("environment", "Environment", says, [table])

    def _environments(self) -> list[tuple[Mapping[str, Any], list[str]]]:
        """The environments that differ in what the page shows, and what ran in each."""
        found: list[tuple[Mapping[str, Any], list[str]]] = []
        for group in self.groups:
            for run in group.runs:
                resumed = (run.environment or {}).get("resumed", [])
                records = [("training of", run.environment), *(("resumed", record) for record in resumed)]
                records += [(what, record.get("environment")) for what, record in _measured(run)]
                for what, record in records:
                    if not isinstance(record, Mapping):
                        continue
                    like = [(one, names) for one, names in found if _look(one) == _look(record)]
                    if not like:
                        found.append((record, []))
                        like = found[-1:]
                    like[0][1].append(f"{what} {run.name}")
        return found

    def list_of_runs(self) -> Section:
        cells = []
        for group in self.groups:
            for run in group.runs:
                masks = "none" if run.masks is None else f"{len(run.masks.epochs)} epochs"
                tested = "none" if run.evaluation is None else ", ".join(run.evaluation["results"]) or "none"
                swept = "none" if run.sweep is None else ", ".join(run.sweep["curves"]) or "none"
                digest = next((sha[:12] for sha, name in run.weights.items() if name == WEIGHTS), "none")
                start = self.before[run.folder]
                begins = _folder(start) if start is not None else run.config.init or "random weights"
                done = f"{len(run.rows)} of {run.config.epochs}"
                cells.append(
                    (_folder(run), group.name, str(run.config.seed), done, begins, tested, swept, masks, digest)
                )
        header = (
            "folder",
            "group",
            "seed",
            "epochs",
            "starts from",
            "evaluation",
            "sweep",
            "masks",
            "weights, SHA-256",
        )
        return Section("runs", "Runs", tables=[Table("The run folders.", header, cells, numbers=False)])


def _results(run: Run) -> Mapping[str, Any]:
    return run.evaluation["results"] if run.evaluation is not None else {}


def _measured(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for what, record in (("evaluation of", run.evaluation), ("sweep of", run.sweep)):
        if record is not None:
            yield what, record


def _look(record: Mapping[str, Any]) -> list[str]:
    return [_plain(record.get(name)) for name in (*ENVIRONMENT, "backends")]


def _hits(run: Run) -> dict[str, Tensor]:
    """Whether each test image was right, by attack, and the labels; nothing where there is no such file.

    Errors: ValueError that names the file where it cannot be read, or is not of the run's evaluation.
    """
    path = run.folder / "evaluation_images.safetensors"
    if not path.is_file() or run.evaluation is None:
        return {}
    found = read_tensors(path)
    checksums = run.evaluation.get("images_sha256", {})  # which evaluations of before lack
    for name, row in run.evaluation["results"].items():
        right, labels = found.get(name, torch.empty(0)), found.get("labels", torch.empty(0))
        same = right.dtype == torch.bool and (int(right.sum()), len(right)) == (row["correct"], row["n"])
        if not same or (name in checksums and images_sha256(labels, right) != checksums[name]):
            raise BadValueError(f"{path} and evaluation.json do not belong together: other images for {name!r}")
    return found


def _paired(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both are of the same images, as far as their labels tell."""
    return "labels" in one and "labels" in other and torch.equal(one["labels"], other["labels"])


def _grid(histories: Mapping[str, tuple[MaskHistory, Mapping[int, str]]], asked: Sequence[int]) -> MaskGrid:
    epochs = sorted({epoch for history, _ in histories.values() for epoch in history.epochs.tolist()})
    if not asked and len(epochs) > EPOCHS:
        asked = [epochs[round(i * (len(epochs) - 1) / (EPOCHS - 1))] for i in range(EPOCHS)]
    shown = list(asked) or epochs
    first = next(iter(histories.values()))[0]
    blocks = []
    for i in range(min(len(first.images), max(1, ROWS // len(histories)))):
        label = first.class_names[int(first.labels[i])]
        rows = [
            (name, [_mask(name, history, methods, i, epoch) for epoch in shown])
            for name, (history, methods) in histories.items()
        ]
        blocks.append((Picture(picture(_rgb(first.images[i])), f"test image: {label}", label), rows))
    caption = (
        "Test images, and after each epoch the pixels that keep the full eps by the class activation map and the run's "
        "rule, orange, with their share; the others get eps_low. Not used: a plain method trained the epoch, and this "
        "is what PART would make of its model."
    )
    return MaskGrid(caption, [f"epoch {epoch}" for epoch in shown], blocks)


def _mask(name: str, history: MaskHistory, methods: Mapping[int, str], i: int, epoch: int) -> Picture | None:
    places = (history.epochs == epoch).nonzero().flatten().tolist()
    if not places:
        return None
    weights = history.weights[places[0], i].float().mean(0)
    share = f"{100 * float(weights.mean()) / 255:.0f} %"
    method = methods.get(epoch)
    used = method in METHODS and METHODS[method].weighted
    source = mask_picture(history.images[i], weights)
    return Picture(source, f"{name}, epoch {epoch}: {share} keep the full eps", share if used else f"{share}, not used")


def _rgb(image: Tensor) -> Tensor:
    return image if image.shape[0] == 3 else image[:1]


def _mean(values: Sequence[float], seeds: int, how: str = ".2f") -> str:
    """Mean ± spread of several values, a value of one; and of how many seeds, where not of all."""
    if not values:
        return ""
    found = mean_and_spread(list(values))
    text = format(found["mean"], how)
    if len(values) > 1:
        text += f" ± {format(found['spread'], how)}"
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds})"


def _average(run: Run, column: str) -> float:
    values = [row[column] for row in run.rows if row[column] is not None]
    return float(sum(values) / max(len(values), 1))


def _folder(run: Run) -> str:
    return f"{run.folder.parent.name}/{run.name}"


def _written(name: str, value: Any) -> str:
    return _in_255(value) if name in IN_255 else _plain(value)


def _in_255(value: float) -> str:
    return f"{255 * value:.4g}/255"


def _plain(value: Any) -> str:
    """A value of a JSON file as a reader writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _unique(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
