"""evaluate and masks: accuracies against plain PyTorch, what they write, that they repeat, what they refuse."""

import csv
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import part_fast
from part_fast.attacks import catalogue
from part_fast.attacks.pgd import pgd
from part_fast.config import TrainConfig
from part_fast.data.catalogue import load
from part_fast.data.memory import to_float
from part_fast.evaluation import accuracy as accuracy_module
from part_fast.evaluation import trained
from part_fast.evaluation.accuracy import AttackSettings, accuracy, evaluate, is_correct
from part_fast.evaluation.masks import adversarial, masks
from part_fast.evaluation.trained import load_model, load_trained
from part_fast.models.catalogue import build_model
from part_fast.models.weights_file import write_weights
from part_fast.report import figures, files

CACHED = functools.lru_cache(load)
CONFIG = TrainConfig(method="part", test_size=30, steps=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Unpack the demo set once."""
    monkeypatch.setattr(trained, "load", CACHED)


@pytest.fixture(scope="module")
def model():
    """resnet-small after four passes over 500 real images: right on most test images, so that attacks matter."""
    torch.manual_seed(0)
    net = build_model("resnet-small", 10)
    data = CACHED("demo", "train").subset(500)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(4):
        for batch in data.batches(25, shuffle=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(to_float(batch.images)), batch.labels).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture
def run(model, tmp_path):
    """A run folder as train leaves it, as far as evaluation reads it."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_weights(folder / "model.safetensors", model.state_dict())
    files.write_json(folder / "config.json", CONFIG.to_json())
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_natural_accuracy_is_that_of_a_plain_forward(model, run):
    data = CACHED("demo", "test").subset(30)
    with torch.no_grad():
        expected = model(to_float(data.images)).argmax(1) == data.labels
    record = evaluate(run, ("natural",))
    right = load_file(run / "evaluation_images.safetensors")
    assert torch.equal(right["natural"], expected)
    assert torch.equal(right["labels"], data.labels)
    said = record["results"]["natural"]
    p = float(expected.float().mean())
    assert 0.4 < p < 1
    assert (said["correct"], said["n"]) == (int(expected.sum()), 30)
    assert said["accuracy"] == pytest.approx(p)
    assert said["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 30))


def test_pgd_is_twenty_steps_of_the_plain_attack(model):
    """The start drawn from the seed on the CPU, then `pgd`, batch by batch."""
    data = CACHED("demo", "test").subset(30)
    settings = AttackSettings(eps=4 / 255, alpha=1 / 255, seed=3)
    got = is_correct(model, data, "pgd20", settings, batch_size=20)
    generator = torch.Generator().manual_seed(3)
    expected = []
    for part in (slice(0, 20), slice(20, 30)):
        x, y = to_float(data.images[part]), data.labels[part]
        start = (x + (torch.rand(x.shape, generator=generator) * 2 - 1) * settings.eps).clamp(0, 1)
        x_adv = pgd(model, x, y, settings.eps, settings.alpha, 20, start=start)
        expected.append(model(x_adv).argmax(1) == y)
    assert torch.equal(got, torch.cat(expected))
    assert int(got.sum()) < int(is_correct(model, data, "natural", settings).sum())


def test_stronger_attacks_fool_more(model):
    data = CACHED("demo", "test").subset(60)
    hits = [int(is_correct(model, data, "pgd5", AttackSettings(eps=eps)).sum()) for eps in (0.0, 6 / 255, 32 / 255)]
    assert hits[0] == int(is_correct(model, data, "natural", AttackSettings()).sum())
    assert hits[0] > hits[1] > hits[2]


def test_repeats_with_its_seed_and_leaves_the_global_generator_alone(run, tmp_path, monkeypatch):
    starts = []

    def keep_start(*arguments, start, **how):
        starts.append(start)
        return pgd(*arguments, start=start, **how)

    monkeypatch.setattr(catalogue, "pgd", keep_start)
    results = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        state = torch.get_rng_state()
        record = evaluate(run, out=tmp_path / name, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)  # a run's numbers must not depend on what else was drawn
        for row in record["results"].values():
            del row["seconds"]
        results.append(record["results"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert results[0] == results[1]
    images = [tmp_path / name / "evaluation_images.safetensors" for name in ("one", "two")]
    assert images[0].read_bytes() == images[1].read_bytes()


def test_files_agree_with_the_result(run):
    record = evaluate(run, ("natural", "pgd2"), n=20)
    assert json.loads((run / "evaluation.json").read_text()) == record
    with (run / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["attack"] for row in rows] == ["natural", "pgd2"]
    right = load_file(run / "evaluation_images.safetensors")
    for row in rows:
        assert float(row["accuracy"]) == record["results"][row["attack"]]["accuracy"]
        assert int(row["correct"]) == int(right[row["attack"]].sum())
    assert record["eps"] == CONFIG.eps
    assert record["alpha"] == CONFIG.alpha
    assert record["n"] == 20


def test_another_attack_joins_and_other_settings_are_refused(run):
    evaluate(run, ("natural",))
    record = evaluate(run, ("pgd1",))
    assert list(record["results"]) == ["natural", "pgd1"]
    before = contents(run)
    for changes, says in (({"n": 10}, "other n"), ({"eps": 0.1, "seed": 2}, "other eps, seed")):
        with pytest.raises(ValueError, match=f"{says}: choose another --out or --overwrite"):
            evaluate(run, ("natural",), **changes)
        assert contents(run) == before
    record = evaluate(run, ("natural",), n=10, overwrite=True)
    assert list(record["results"]) == ["natural"]
    assert record["results"]["natural"]["n"] == 10


def test_checkpoint_alone(model, run, tmp_path):
    file = tmp_path / "elsewhere" / "net.pt"
    file.parent.mkdir()
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, file)
    record = evaluate(file, ("natural",), n=30, dataset="demo", model="resnet-small")
    expected = evaluate(run, ("natural",))
    assert record["results"]["natural"]["correct"] == expected["results"]["natural"]["correct"]
    assert (file.parent / "evaluation.json").is_file()
    with pytest.raises(ValueError, match="name --dataset and --model"):
        evaluate(file)
    with pytest.raises(ValueError, match="does not fit ResNet"):
        load_trained(file, dataset="demo", model="resnet18")


def test_load_model_gives_the_runs_network_without_its_data(model, run, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the data set is not needed")

    monkeypatch.setattr(trained, "load", refuse)
    x = torch.rand(2, 3, 32, 32)
    state = torch.get_rng_state()
    with torch.no_grad():
        expected = model(x)
    for where in (run, str(run), run / "model.safetensors"):
        net = part_fast.load_model(where)
        assert not net.training
        assert all(p.requires_grad for p in net.parameters())
        with torch.no_grad():
            assert torch.equal(net(x), expected)
        assert torch.equal(torch.get_rng_state(), state)
    write_weights(run / "averaged.safetensors", {key: value + 1 for key, value in model.state_dict().items()})
    averaged = load_model(run / "averaged.safetensors").state_dict()
    assert all(torch.equal(value, model.state_dict()[key] + 1) for key, value in averaged.items())


def test_load_model_of_a_checkpoint_alone_or_of_a_folders_run(model, run, tmp_path):
    alone = tmp_path / "net.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, alone)
    net = load_model(alone, model="resnet-small")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="model must be given, such as 'resnet18'"):
        load_model(alone)
    with pytest.raises(ValueError, match="does not fit ResNet"):
        load_model(alone, model="resnet-small", num_classes=7)
    config = dataclasses.replace(CONFIG, dataset="folder:pictures@32")
    files.write_json(run / "config.json", config.to_json())
    with pytest.raises(ValueError, match=r"num_classes must be given for .*, which was trained on folder:pictures@32"):
        load_model(run)
    assert load_model(run, num_classes=10).num_classes == 10
    with pytest.raises(ValueError, match="does not fit"):
        load_model(run, num_classes=7)
    with pytest.raises(FileNotFoundError, match="there is no run folder or checkpoint at"):
        load_model(tmp_path / "nothing")
    with pytest.raises(TypeError, match=r"^where must be a path, got NoneType$"):
        load_model(None)
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no epoch of it is finished"):
        load_model(run)


def test_load_model_of_somebody_elses_network_says_what_its_images_are(tmp_path):
    vision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    net = vision.squeezenet1_1(num_classes=3)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.warns(UserWarning, match=r"torchvision:squeezenet1_1 gets images in \[0,1\]"):
        loaded = load_model(tmp_path / "net.pt", model="torchvision:squeezenet1_1", num_classes=3)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in net.state_dict().items())


def test_load_model_builds_no_code_that_a_run_folder_alone_names(run):
    files.write_json(run / "config.json", dataclasses.replace(CONFIG, model="somewhere:network").to_json())
    with pytest.raises(ValueError, match="somewhere:network"):
        load_model(run)


def test_loaded_model_is_in_eval_mode_and_mode_is_given_back(model, run):
    net = load_trained(run).model
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    model.train()
    statistics = {key: value.clone() for key, value in model.state_dict().items()}
    is_correct(model, CACHED("demo", "test").subset(10), "pgd1", AttackSettings())
    assert model.training
    assert all(torch.equal(value, statistics[key]) for key, value in model.state_dict().items())
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attacks": ("natural", "apgd")}, r"attacks must be of natural, .*, mma, aa, got 'apgd'"),
        ({"attacks": ("pgd0",)}, "attacks must be of natural"),
        ({"attacks": ()}, "at least one of"),
        ({"attacks": ("pgd2", "pgd2")}, "each once"),
        ({"n": 0}, "n takes an integer from 1 to 1000"),
        ({"n": 1001}, "n takes an integer from 1 to 1000"),
        ({"eps": -0.1}, "eps must be finite and >= 0"),
        ({"eps": math.nan}, "eps must be finite"),
        ({"alpha": -1.0}, "alpha"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"dataset": "mnist"}, "data set takes one of demo"),
        ({"model": "vgg"}, "model takes one of"),
        ({"device": "tpu"}, "device takes"),
    ],
)
def test_refusals_write_nothing(run, arguments, says):
    before = contents(run)
    with pytest.raises(ValueError, match=says):
        evaluate(run, **arguments)
    assert contents(run) == before


def test_missing_things(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="no run folder or checkpoint at"):
        evaluate(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        evaluate(tmp_path)
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no epoch of it is finished"):
        evaluate(run)


def test_standard_error():
    assert accuracy(torch.tensor([True, True, True, False])) == {
        "accuracy": 0.75, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4)), "correct": 3, "n": 4,
    }  # fmt: skip


def test_mask_grid_has_a_row_per_image_and_says_what_it_shows(run, tmp_path):
    out = tmp_path / "new" / "grid.png"
    record = masks(run, out, n=3)
    assert json.loads(out.with_suffix(".json").read_text()) == record
    assert [row["label"] for row in record["images"]] == [
        CACHED("demo", "test").class_names[i] for i in CACHED("demo", "test").subset(3).labels
    ]
    for row in record["images"]:
        assert 0 < row["share_of_full_eps"] < 0.5  # the pixels more than one deviation above the mean
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(float)
    taller = tmp_path / "five.png"
    masks(run, taller, n=5)
    heights = pixels.shape[0], Image.open(taller).height
    assert heights[1] - heights[0] == pytest.approx(2 * 150 * 1.82, abs=2)  # two rows more at 150 dots an inch
    # Five pictures side by side in each of the three rows: columns between them are white, those in them are not.
    ink = (pixels < 250).any(2)
    assert 0.3 < ink.mean() < 0.95
    row = ink[int(0.75 * 150 + 0.6 * 150) :][: int(0.6 * 150)].mean(0) > 0.5
    starts = np.flatnonzero(row[1:] & ~row[:-1])
    assert len(starts) == 5


def test_mask_grid_repeats_and_follows_the_rule(run, tmp_path):
    one, two = masks(run, tmp_path / "1.png", n=2), masks(run, tmp_path / "2.png", n=2)
    assert one == two
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    half = masks(run, tmp_path / "3.png", n=2, rule="quantile:0.5")
    assert [row["share_of_full_eps"] for row in half["images"]] == [0.5, 0.5]
    masks(run, tmp_path / "4.png", n=1, rule="released")
    masks(run, tmp_path / "5.png", n=1, rule="soft")
    assert (tmp_path / "4.png").read_bytes() != (tmp_path / "5.png").read_bytes()


def test_masks_of_a_released_run_are_by_its_rule_or_by_the_one_that_is_asked_for(run, tmp_path):
    files.write_json(run / "config.json", dataclasses.replace(CONFIG, released=True).to_json())
    own = masks(run, tmp_path / "own.png", n=4)
    asked = masks(run, tmp_path / "asked.png", n=4, rule="released")
    assert own["rule"] == "released"
    assert own["images"] == asked["images"]
    other = masks(run, tmp_path / "other.png", n=4, rule="quantile:0.25")
    for row in other["images"]:  # of 32 x 32 pixels; those that equal the quantile keep eps too
        assert 0.25 <= row["share_of_full_eps"] < 0.3


def test_another_data_set_is_not_looked_for_where_the_run_found_its_own(run, monkeypatch):
    roots = []
    monkeypatch.setattr(
        trained, "load", lambda name, split, root, download: roots.append(root) or CACHED("demo", split)
    )
    files.write_json(run / "config.json", dataclasses.replace(CONFIG, root="/of/the/run").to_json())
    load_trained(run, 1)
    load_trained(run, 1, dataset="demo")
    load_trained(run, 1, dataset="cifar10")
    load_trained(run, 1, dataset="cifar10", root="/asked/for")
    assert roots == ["/of/the/run", "/of/the/run", None, "/asked/for"]


def test_masks_of_a_plain_method_whose_eps_is_below_eps_low(run, tmp_path):
    config = dataclasses.replace(CONFIG, method="at", eps=4 / 255)
    files.write_json(run / "config.json", config.to_json())
    record = masks(run, tmp_path / "grid.png", n=1)
    assert (record["eps"], record["eps_low"]) == (4 / 255, 4 / 255)


def test_grid_shows_the_attack_within_the_eps_map(run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures, "draw_masks", lambda path, x, cams, maps, x_adv, titles, caption: drawn.update(locals())
    )
    record = masks(run, tmp_path / "grid.png", n=4, rule="zscore, released")
    drawn["eps"] = drawn["maps"]["zscore"]
    assert drawn["maps"]["released"].shape[1] == 3
    assert record["rule"] == "zscore,released"
    assert 0 < record["images"][0]["share_of_full_eps_released"] < 1
    change = (drawn["x_adv"] - drawn["x"]).abs()
    assert bool((change <= drawn["eps"] + 1e-7).all())  # rounding of x + eps near 1
    assert float(change.max()) > CONFIG.eps_low + 1e-6
    cams = drawn["cams"]
    assert cams.shape == (4, 32, 32)
    assert float(cams.amin()) >= 0
    # The pixels with the full eps are the highest of the CAM.
    for cam, eps in zip(cams, drawn["eps"][:, 0], strict=True):
        full = eps > (CONFIG.eps + CONFIG.eps_low) / 2
        assert float(cam[full].min()) >= float(cam[~full].max()) - 1e-6


def test_mask_grid_refusals(run, tmp_path):
    out = tmp_path / "grid.png"
    out.write_text("mine")
    with pytest.raises(ValueError, match="exists: choose another --out or --overwrite"):
        masks(run, out)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match=r"out takes a \.png file"):
        masks(run, tmp_path / "grid.pdf")
    with pytest.raises(ValueError, match="rule must be one of"):
        masks(run, tmp_path / "other.png", rule="otsu")
    with pytest.raises(ValueError, match="n takes"):
        masks(run, tmp_path / "other.png", n=0)
    assert not (tmp_path / "other.png").exists()
    masks(run, out, n=1, overwrite=True)
    assert Image.open(out).format == "PNG"


def test_a_class_of_the_run_is_read_from_its_configuration(run):
    files.write_json(run / "config.json", dataclasses.replace(CONFIG, model="resnet18").to_json())
    with pytest.raises(ValueError, match="does not fit ResNet"):
        load_trained(run)


def test_mma_is_at_least_as_strong_as_pgd_on_the_whole(model):
    data = CACHED("demo", "test").subset(60)
    settings = AttackSettings(eps=0.06, alpha=0.015, seed=3)
    mma, pgd20 = (is_correct(model, data, name, settings).float().mean() for name in ("mma", "pgd20"))
    assert mma <= pgd20 + 0.05  # three images: another loss, another start


def test_autoattack_goes_on_where_it_was_stopped(run, monkeypatch):
    """Each batch is attacked once, however often the evaluation is stopped."""
    seen = []

    def attack(model, x, y, eps, seed):
        if len(seen) == 2:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(x)
        return x

    monkeypatch.setattr(catalogue, "autoattack", attack)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, ("aa",), batch_size=10)
    assert list(run.glob("evaluation_aa_*.safetensors"))
    record = evaluate(run, ("aa", "natural"), batch_size=10)
    assert len([x for x in seen if x is not None]) == 3
    assert record["results"]["aa"]["correct"] == record["results"]["natural"]["correct"]
    assert not list(run.glob("evaluation_aa_*.safetensors"))


def test_other_settings_do_not_go_on_with_a_stopped_autoattack(run, monkeypatch):
    calls = []

    def attack(model, x, y, eps, seed):
        calls.append(eps)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return x

    monkeypatch.setattr(catalogue, "autoattack", attack)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, ("aa",), batch_size=10)
    evaluate(run, ("aa",), batch_size=10, eps=0.01)
    assert calls == [8 / 255] * 2 + [0.01] * 3


def test_warnings_and_sanity_are_in_the_record(run):
    record = evaluate(run, ("natural", "pgd5"), sanity_images=10)
    assert record["warnings"] == json.loads((run / "evaluation.json").read_text())["warnings"]
    assert record["sanity"]["n"] == 10
    assert 0 <= record["sanity"]["pgd100"] <= 1


def test_a_sanity_check_outlives_other_evaluations_of_the_folder(run, monkeypatch):
    monkeypatch.setattr(accuracy_module, "gradient_flags", lambda *of: (["corners beat PGD"], {"n": 10}))
    evaluate(run, ("natural",), sanity_images=10)
    for again in ({"attacks": ("pgd5",)}, {"attacks": ("natural",), "resume": True}):
        record = evaluate(run, **again)
        assert record["sanity"] == {"n": 10, "warnings": ["corners beat PGD"]}
        assert record["warnings"] == json.loads((run / "evaluation.json").read_text())["warnings"]
        assert record["warnings"][-1] == "corners beat PGD"
    path = run / "evaluation.json"
    before = json.loads(path.read_text())
    del before["sanity"]["warnings"]  # as files of before have them
    path.write_text(json.dumps(before))
    assert "corners beat PGD" in evaluate(run, ("natural",), resume=True)["warnings"]
    path.write_text(json.dumps({**before, "warnings": 3}))
    with pytest.raises(ValueError, match="is damaged: its sanity check has no warnings"):
        evaluate(run, ("natural",), resume=True)
    monkeypatch.setattr(accuracy_module, "gradient_flags", lambda *of: ([], {"n": 5}))
    record = evaluate(run, ("natural",), sanity_images=5, overwrite=True)
    assert (record["sanity"], record["warnings"]) == ({"n": 5, "warnings": []}, [])


def test_seconds_of_a_stopped_attack_are_those_of_all_its_pieces(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(accuracy_module.time, "perf_counter", lambda: now[0])

    def attack(model, x, y, eps, seed):
        if now[0] == 200:
            now[0] += 1
            raise KeyboardInterrupt
        now[0] += 100
        return x

    monkeypatch.setattr(catalogue, "autoattack", attack)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, ("aa",), batch_size=10)
    now[0] += 10_000  # nobody counts what passes in between
    assert evaluate(run, ("aa",), batch_size=10)["results"]["aa"]["seconds"] == 300.0


def test_adversarial_images_of_several_networks_have_one_eps(run, tmp_path, monkeypatch):
    drawn = {}
    plain = figures.draw_adversarial

    def keep(path, x, attacked, caption):
        drawn.update(x=x, attacked=attacked)
        plain(path, x, attacked, caption)

    monkeypatch.setattr(figures, "draw_adversarial", keep)
    adversarial({"AT": run, "PART": run}, tmp_path / "grid.png", n=2, eps=16 / 255)
    assert (tmp_path / "grid.png").stat().st_size > 5_000
    assert list(drawn["attacked"]) == ["AT", "PART"]
    for x_adv, titles in drawn["attacked"].values():
        change = (x_adv - drawn["x"]).abs()
        assert 15 / 255 < float(change.max()) <= 16 / 255 + 1e-6
        assert len(titles) == 2
    with pytest.raises(ValueError, match="exists"):
        adversarial({"AT": run}, tmp_path / "grid.png")
    with pytest.raises(ValueError, match="runs must be of one data set, got none"):
        adversarial({}, tmp_path / "other.png")
