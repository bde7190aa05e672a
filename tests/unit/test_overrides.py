"""Overrides: what is set, what is refused, and generated mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from config_sample import (
    ALLOW,
    HERE,
    L1,
    Ema,
    Huber,
    Net,
    Shifted,
    Span,
    changed,
    refused,
    sample,
)

from fastflow.config import Lazy, diff, lazy, override
from fastflow.errors import ConfigError
from fastflow.parts import Part, parameters

SET = [
    ("steps=5", lambda r: r.steps, 5),
    ("flip=true", lambda r: r.flip, True),
    ("root=/data/x.zip", lambda r: r.root, "/data/x.zip"),
    ("root='a b'", lambda r: r.root, "a b"),
    ("root=a=b", lambda r: r.root, "a=b"),
    ("root=null", lambda r: r.root, None),
    ("name='no'", lambda r: r.name, "no"),
    ("name='007'", lambda r: r.name, "007"),
    ("name=1e-4x", lambda r: r.name, "1e-4x"),
    ("root=${oc.env:HOME}", lambda r: r.root, "${oc.env:HOME}"),
    ("root=???", lambda r: r.root, "???"),
    ("flip=yes", lambda r: r.flip, True),
    ("method.gap=4", lambda r: r.method.gap, 4),
    ("method.mode=ratio", lambda r: r.method.mode, "ratio"),
    ("method.metric.c=1e-4", lambda r: r.method.metric, Huber(c=1e-4)),
    ("method.metric.c=1", lambda r: r.method.metric, Huber(c=1.0)),
    ("method.span.high=.inf", lambda r: r.method.span.high, math.inf),
    ("method.weights.far=3", lambda r: dict(r.method.weights), {"near": 1.0, "far": 3.0}),
    ("method.weights={a: 1}", lambda r: dict(r.method.weights), {"a": 1.0}),
    ("callbacks.0.decay=0.9999", lambda r: r.callbacks[0], lazy(Ema, decay=0.9999)),
    ("callbacks.1.keys=[loss, lr]", lambda r: r.callbacks[1].keys, ["loss", "lr"]),
    ("callbacks=[]", lambda r: r.callbacks, ()),
    ("network.model.channel_mult=[1,2,2]", lambda r: r.network.model.channel_mult, (1, 2, 2)),
    ("network.model.channel_mult.1=4", lambda r: r.network.model.channel_mult, (1, 4)),
    ("network.model.channel_mult.+=4", lambda r: r.network.model.channel_mult, (1, 2, 4)),
    ("optimizer.lr=1e-3", lambda r: r.optimizer.lr, 1e-3),
    ("optimizer.betas.0=0.5", lambda r: r.optimizer.betas, (0.5, 0.999)),
    ("optimizer=torch.optim:AdamW", lambda r: r.optimizer, lazy(torch.optim.AdamW)),
    (
        "optimizer={_target_: torch.optim:SGD, lr: 1}",
        lambda r: r.optimizer,
        lazy(torch.optim.SGD, lr=1),
    ),
    (f"method.metric={HERE}:L1", lambda r: r.method.metric, L1()),
    (f"method.metric={{_target_: {HERE}:Huber, c: 0.03}}", lambda r: r.method.metric, Huber()),
    (f"method.law={HERE}:L1", lambda r: r.method.law, L1()),
    (f"network.model={HERE}:Net", lambda r: r.network.model, lazy(Net)),
    (
        f"method.metric={{_target_: {HERE}:Shifted, shift: 1, inner: {{_target_: {HERE}:L1}}}}",
        lambda r: r.method.metric,
        Shifted(inner=L1(), shift=1),
    ),
    (
        f"callbacks.+={{_target_: {HERE}:Ema, decay: 0.5}}",
        lambda r: r.callbacks[2],
        lazy(Ema, decay=0.5),
    ),
]


@pytest.mark.parametrize(("assignment", "read", "value"), SET, ids=[s[0] for s in SET])
def test_override_sets(assignment, read, value):
    before = sample()
    after = override(before, [assignment], allow=ALLOW)
    assert read(after) == value
    assert type(read(after)) is type(value)
    assert before == sample()
    assert bool(diff(before, after)) == (before != after)


def test_overrides_apply_together_and_in_any_order():
    both = ["method.span.low=5", "method.span.high=6"]
    assert changed(*both).method.span == changed(*reversed(both)).method.span == Span(low=5, high=6)
    swap = [f"method.metric={HERE}:Huber", "method.metric.c=2"]
    assert changed(*swap).method.metric == changed(*reversed(swap)).method.metric == Huber(c=2)
    appended = changed("network.model.channel_mult.+=3", "network.model.channel_mult.+=5")
    assert appended.network.model.channel_mult == (1, 2, 3, 5)
    assert changed() == sample()


REFUSED = [
    ("steps", "override 'steps' has no '='"),
    ("=5", "override '=5' has an empty key"),
    ("method..gap=5", "override 'method..gap=5' has an empty key"),
    ("stepz=5", "stepz: Run has no 'stepz'; did you mean 'steps'? accepted: callbacks, flip, meth"),
    ("method.gab=5", "method.gab: method (Method) has no 'gab'; did you mean 'gap'?"),
    ("method.metric.d=5", "method.metric.d: method.metric (Huber) has no 'd'"),
    ("network.model.chanels=5", "network.model.chanels: network.model (Net) has no 'chanels'; did"),
    ("method.gap.k=4", "method.gap.k: method.gap is 8 (int) and has no 'k'; method.gap=value"),
    ("root.x=4", "root.x: root is None and has no 'x'"),
    ("optimizer.params.x=4", "optimizer.params.x: optimizer.params is not set"),
    ("method.weights.fa=1", "method.weights.fa: method.weights has no 'fa'; did you mean 'far'?"),
    ("callbacks.2.decay=1", "callbacks.2.decay: callbacks has no '2'; its length is 2, accepted: "),
    ("callbacks.-1.decay=1", "callbacks has no '-1'; its length is 2, accepted: 0 to 1, or +"),
    ("callbacks.first=1", "callbacks.first: callbacks has no 'first'"),
    ("callbacks.+.decay=1", "callbacks.+.decay: nothing follows '+'"),
    ("steps=abc", "steps: 'abc' (str) given, int accepted"),
    ("steps=", "steps: None given, int accepted"),
    ("steps=1.5", "steps: 1.5 (float) given, int accepted"),
    ("flip=ja", "flip: 'ja' (str) given, bool accepted"),
    ("callbacks.0.decay=.nan", "callbacks.0.decay: nan given, a number accepted"),
    ("name=3", "name: 3 (int) given, str accepted"),
    ("name=no", "name: False (bool) given, str accepted"),
    ("name=007", "name: '007' given, which YAML reads as 7; write 7, or quote a text"),
    ("name=${", "name: not valid YAML: no viable alternative at input '${'"),
    ("method.weights={a: [1, 'x ${']}", "method.weights: not valid YAML: a[1]: no viable"),
    ("name=[a", "name: not valid YAML"),
    ("name={a: 1, a: 2}", "name: not valid YAML: line 1 found duplicate key a"),
    ("name=!!python/name:os.system", "name: not valid YAML: line 1 could not determine"),
    ("name=!!set {a}", "name: not valid YAML: Value 'set' is not a supported"),
    ("name=!!bool x", "name: not valid YAML"),
    ("name=!!int ''", "name: not valid YAML"),
    ("name=!!timestamp x", "name: not valid YAML"),
    ("method.mode=gird", "method.mode: 'gird' (str) given, 'grid' | 'ratio' accepted"),
    ("method.weights.far=x", "method.weights.far: 'x' (str) given, float accepted"),
    ("network.model.channel_mult=[1,a]", "network.model.channel_mult.1: 'a' (str) given, int acc"),
    ("network.model.channel_mult.0=a", "network.model.channel_mult.0: 'a' (str) given, int acc"),
    ("optimizer.betas.+=0.9", "optimizer.betas: 3 values given, 2 accepted"),
    ("optimizer.betas=[0.9]", "optimizer.betas: 1 values given, 2 accepted"),
    ("method.metric.c=-1", "method.metric.c: -1.0 given, a number > 0 accepted"),
    ("method.span.low=2", "method.span: low=2.0, high=1.0 given, low < high accepted"),
    ("method.metric=l1", f"method.metric: 'l1' (str) given, Metric (one of {HERE}:Huber, {HERE}:L"),
    ("method.metric={c: 1}", "method.metric: a mapping without _target_ given"),
    ("method.metric=os:system", "method.metric._target_: 'os:system' is refused; classes of these"),
    ("method.metric=methods.nothing:X", "methods has no module 'nothing'"),
    (f"method.metric={HERE}:Hubert", f"{HERE} has no class 'Hubert'; did you mean 'Huber'?"),
    (f"method.metric={HERE}:Metric", "method.metric: Metric is abstract; one of its kinds"),
    (f"method.metric={HERE}:Span", "method.metric: Span(low=0.0, high=1.0) (Span) given, Metric"),
    (f"method.metric={HERE}:Shifted", "method.metric: Shifted needs inner (Metric (one of"),
    (f"method.metric={{_target_: {HERE}:Huber, d: 1}}", "method.metric.d: Huber takes no 'd'"),
    (f"method.metric={{_target_: {HERE}:Huber, c: x}}", "method.metric.c: 'x' (str) given, float"),
    (f"method.metric={{_target_: {HERE}:Huber, c: 0}}", "method.metric.c: 0.0 given"),
    ("network=torch.optim:Adam", "network: lazy(Adam, lr=0.001"),
    ("optimizer={_target_: torch.optim:Adam, lr: x}", "optimizer.lr: 'x' (str) given, float"),
]


@pytest.mark.parametrize(("assignment", "text"), REFUSED, ids=[r[0] for r in REFUSED])
def test_override_refuses(assignment, text):
    refused(lambda: changed(assignment), text)


def test_override_refuses_a_repeated_key():
    refused(lambda: changed("steps=1", "flip=true", "steps=2"), "steps: set 2 times")


# Generated mistakes


def leaves(node: object, key: str = "") -> list[tuple[str, type]]:
    """Every dotted key of the sample with the class that owns its last segment."""
    if isinstance(node, Part | Lazy):
        cls = node.target if isinstance(node, Lazy) else type(node)
        children = {n: getattr(node, n, None) for n in parameters(cls)}
    elif isinstance(node, tuple) and node and isinstance(node[0], Lazy):
        children, cls = dict(enumerate(node)), tuple
    else:
        return []
    found = []
    for name, child in children.items():
        full = f"{key}.{name}" if key else str(name)
        found += [(full, cls), *leaves(child, full)]
    return found


def misspelt(word: str) -> list[str]:
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)]
    dropped = [word[:i] + word[i + 1 :] for i in range(len(word))]
    return [w for w in dict.fromkeys([*swapped, *dropped, word + "s", word.upper()]) if w]


TYPOS = [
    (f"{key.rpartition('.')[0]}{'.' if '.' in key else ''}{wrong}", wrong, cls)
    for key, cls in leaves(sample())
    if cls is not tuple
    for wrong in misspelt(key.rpartition(".")[2])
    if wrong not in parameters(cls)
]


def test_every_typo_is_refused_with_its_key_and_the_accepted_names():
    assert len(TYPOS) > 200
    for key, wrong, cls in TYPOS:
        message = refused(lambda key=key: changed(f"{key}=1"), f"has no {wrong!r}; ")
        assert message.startswith(f"{key}: ")
        assert message.endswith(f"accepted: {', '.join(sorted(parameters(cls)))}")


WRONG = {
    "name": ["3", "null", "true", "[a]", "{a: b}", "1e-4"],
    "steps": ["a", "1.5", "null", "true", "[1]", "1e3", "{a: 1}"],
    "flip": ["1", "0", "ja", "null", "[true]"],
    "root": ["3", "true", "[a]", "{a: b}"],
    "method": ["3", "null", "x", "[]", "{}", "{gap: 3}"],
    "method.metric": ["3", "null", "Huber", "true", "[1]", "{c: 1}", "os:system"],
    "method.metric.c": ["a", "null", "true", "[1]", "{a: 1}", "1-4"],
    "method.gap": ["a", "2.0", "null", "false"],
    "method.mode": ["Grid", "null", "1", "true", "[grid]"],
    "method.law": ["3", "x", "true", "[1]"],
    "method.weights": ["3", "null", "[1]", "{a: b}", "{1: 2}"],
    "network": ["3", "null", "x", "{channels: 3}", "torch.optim:Adam"],
    "network.model": ["3", "null", "x", "[1]", "torch.optim:Adam"],
    "network.model.channels": ["a", "1.5", "null"],
    "network.model.channel_mult": ["3", "a", "null", "[1.5]", "[a]", "[[1]]", "{a: 1}"],
    "network.model.channel_mult.0": ["a", "1.5", "null", "[1]"],
    "network.model.dropout": ["a", "null", "true"],
    "network.label": ["3", "true", "[a]"],
    "optimizer": ["3", "null", "Adam", f"{HERE}:Net"],
    "optimizer.lr": ["a", "null", "true", "[1]"],
    "optimizer.betas": ["0.9", "[0.9]", "[0.9, a]", "null", "[0.9, 0.9, 0.9]"],
    "optimizer.amsgrad": ["1", "ja", "null"],
    "callbacks": ["3", "null", "x", "[1]", "[null]", "{a: 1}"],
    "callbacks.0": ["3", "null", "x"],
    "callbacks.0.decay": ["a", "null", "true"],
    "callbacks.0.every": ["1.5", "a", "null"],
    "callbacks.1.keys": ["3", "loss", "[1]"],
}


def test_every_wrong_type_is_refused_with_its_key_and_the_accepted_types():
    for key, texts in WRONG.items():
        for text in texts:
            message = refused(lambda a=f"{key}={text}": changed(a), "accepted")
            assert message.startswith(key), f"{key}={text}: {message}"


@pytest.mark.parametrize("text", ["010", "12:30", "-01", " 1:30.5"])
def test_numbers_that_yaml_reads_as_others_are_refused(text):
    with pytest.raises(ConfigError, match="which YAML reads as"):
        override(sample(), [f"steps={text}"])
