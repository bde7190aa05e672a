"""Plain data, YAML and comparison of experiments."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import pickle

import pytest
import torch
from config_sample import (
    ALLOW,
    HERE,
    L1,
    Ema,
    Huber,
    Log,
    Method,
    Run,
    Shifted,
    Span,
    changed,
    refused,
    sample,
)

from fastflow.config import (
    diff,
    from_plain,
    lazy,
    load_yaml,
    packages_of,
    read_yaml,
    save_yaml,
    to_plain,
    to_yaml,
)
from fastflow.parts import Part

# What YAML 1.1, YAML 1.2 or OmegaConf would read as something else than text, or change.
TEXTS = [
    *("yes", "No", "on", "y", "true", "null", "~", "", "???", "${x}", "${oc.env:HOME}", "$"),
    *("007", "12:30", "1:20:30", "0x10", "0o7", "0b1", "1_000", "1e-4", "1e5", "+1", "1.", "."),
    *(".inf", "nan", "-", "=", "<<", "2020-01-01", "{", "[a]", "a: b", "- a", "&a", "*a", "!a"),
    *("ü # x", "a\nb", "\n", " a ", "\t", "'", '"', "\\", "\x07", "a\u2028b", "x " * 100, "😀"),
]


def rich() -> Run:
    return sample(
        method=Method(
            metric=Shifted(inner=Huber(c=1e-08), shift=-math.inf),
            law=L1(),
            span=Span(low=-math.inf, high=1e300),
            weights={"yes": 1.0, "1": 2.0, "a: b": 0.1 + 0.2, "": 5e-324, "???": 1e16},
        ),
        root="no",
        flip=True,
        callbacks=(lazy(Log, keys=TEXTS), lazy(Log)),
    )


@pytest.mark.parametrize("make", [sample, rich])
def test_yaml_round_trip_is_equal(make, tmp_path):
    path = tmp_path / "experiment.yaml"
    save_yaml(make(), path)
    assert load_yaml(path, allow=ALLOW) == make()
    assert read_yaml(path) == to_plain(make())
    assert pickle.loads(pickle.dumps(make())) == make()
    assert os.listdir(tmp_path) == ["experiment.yaml"]


def test_a_tree_can_be_read_again_with_its_own_packages(tmp_path):
    assert packages_of(sample()) == (HERE, "torch.optim.adam")
    (tmp_path / "x.yaml").write_text(to_yaml(sample()))
    assert load_yaml(tmp_path / "x.yaml", allow=packages_of(sample())) == sample()


def test_yaml_has_every_argument_and_survives_infinity(tmp_path):
    plain = to_plain(sample())
    assert plain["optimizer"]["betas"] == [0.9, 0.999]
    assert plain["network"]["model"] == {
        "_target_": f"{HERE}:Net",
        "channels": 4,
        "channel_mult": [1, 2],
        "dropout": 0.1,
    }
    run = sample(callbacks=(lazy(Ema, decay=math.inf),))
    save_yaml(run, tmp_path / "x.yaml")
    again = load_yaml(tmp_path / "x.yaml", allow=ALLOW)
    assert math.isinf(again.callbacks[0].decay)
    assert diff(run, again) == []


def test_saving_names_what_cannot_be_saved(tmp_path):
    run = sample(method=Method(metric=L1(), law=lambda x: x))
    refused(lambda: save_yaml(run, tmp_path / "x.yaml"), "method.law: <function", "cannot be saved")
    assert os.listdir(tmp_path) == []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Local(Part):
        pass

    refused(lambda: to_plain(Local()), "Local", "move the class to the top of its module")

    class Level(enum.IntEnum):
        LOW = 1

    refused(lambda: to_plain({"a": [Level.LOW]}), "a.0: <Level.LOW: 1> (Level) cannot be saved")
    refused(lambda: to_yaml({"a": ["x ${"]}), "a[0]: no viable alternative", "cannot be saved")
    refused(lambda: to_yaml({"a": {None: 1}}), "a: Incompatible key type", "cannot be saved")


TARGETS = [
    ("os:system", "'os:system' is refused; classes of these packages are accepted: fastflow, "),
    ("torch:Tensor", "is refused"),
    ("torch.optimx:Adam", "is refused"),
    ("fastflow.config:os", "fastflow.config has no class 'os'"),
    ("fastflow.config:build", "fastflow.config has no class 'build'"),
    ("fastflow.config:Mapping", "comes from collections.abc, which is refused"),
    ("fastflow.config:Lazy.replace", "module:Class accepted"),
    ("fastflow.config", "module:Class accepted"),
    ("fastflow..config:Lazy", "module:Class accepted"),
    ("fastflow.confi:Lazy", "fastflow has no module 'confi'; did you mean 'config'?"),
    ("fastflow.config.x:Lazy", "fastflow.config has no module 'x'"),
    ("torch.optim:Adan", "torch.optim has no class 'Adan'; "),
    (3, "3 (int) given, module:Class accepted"),
    (None, "None given, module:Class accepted"),
]


@pytest.mark.parametrize(("target", "text"), TARGETS)
def test_only_our_own_classes_are_looked_up(target, text):
    refused(lambda: from_plain({"a": [{"_target_": target}]}), "a.0._target_: ", text)


def test_other_packages_are_looked_up_when_allowed():
    data = {"_target_": f"{HERE}:Huber", "c": 1}
    refused(lambda: from_plain(data), "is refused")
    assert from_plain(data, allow=ALLOW) == Huber(c=1)
    assert from_plain({"_target_": "torch.optim:Adam"}) == lazy(torch.optim.Adam)


YAML = [
    ("steps: 1\nsteps: 2\n", "line 2 found duplicate key steps"),
    ("a: [1\n", "not valid YAML: line 2"),
    ("a: 1\n---\nb: 2\n", "not valid YAML: line 2"),
    ("a:\n  b: x ${\n", "not valid YAML: a.b: no viable alternative at input '${'"),
    ("a: !!python/object/apply:os.system [x]\n", "not valid YAML: line 1"),
    ("[1]: 2\n", "not valid YAML: line 1 found unhashable key"),
    ("null: 2\n", "not valid YAML: Incompatible key type 'NoneType'"),
    ("a: \x00\n", "not valid YAML"),
    (f"_target_: {HERE}:Run\nnam: x\n", "nam: Run takes no 'nam'; did you mean 'name'?"),
    (f"_target_: {HERE}:Run\nname: x\n", "Run needs method (Method), network (lazy(Module, ...))"),
    (f"_target_: {HERE}:Span\nlow: 3\n", "Span: low=3.0, high=1.0 given"),
]


@pytest.mark.parametrize(("text", "message"), YAML)
def test_yaml_files_are_read_strictly(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    refused(lambda: load_yaml(path, allow=ALLOW), f"{path}: ", message)


@pytest.mark.parametrize("count", [2_000, 100_000])
@pytest.mark.parametrize("text", ["[", "{a: ", "- ", "? "])
def test_a_deeply_nested_file_is_refused(text, count, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text * count)
    refused(lambda: load_yaml(path), f"{path}: not valid YAML")


def test_a_file_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes("a: ü".encode("latin-1"))
    refused(lambda: read_yaml(tmp_path / "x.yaml"), "x.yaml: not valid YAML: 'utf-8' codec")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("3", 3),
        ("abc", "abc"),
        ("- 1e-4\n- ${x}", [1e-4, "${x}"]),
        ("{a: .5}", {"a": 0.5}),
    ],
)
def test_a_yaml_file_can_hold_anything_plain(text, value, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    assert read_yaml(tmp_path / "x.yaml") == value


# Comparison


def test_diff_has_one_line_for_each_change():
    old = sample()
    assert diff(old, sample()) == []
    assert diff(old, changed("steps=7", "network.model.channel_mult.+=3")) == [
        "network.model.channel_mult.2: (absent) -> 3",
        "steps: 100 -> 7",
    ]
    assert diff(to_plain(old), changed(f"method.metric={HERE}:L1")) == [
        f"method.metric: {HERE}:Huber(c=0.5) -> {HERE}:L1()"
    ]
    assert (
        diff(old, changed("callbacks=[]"))[1] == f"callbacks.1: {HERE}:Log(keys=None) -> (absent)"
    )
    assert diff({"a": 1}, {"a": True}) == ["a: 1 -> True"]


def test_diff_of_stored_text_needs_no_class(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(to_yaml(sample()).replace("Huber", "Gone").replace("steps: 100", "steps: 7"))
    refused(lambda: load_yaml(path, allow=ALLOW), "has no class 'Gone'")
    metric = f"method.metric: {HERE}:Gone(c=0.5) -> {HERE}:Huber(c=0.5)"
    assert diff(read_yaml(path), sample()) == [metric, "steps: 7 -> 100"]
