"""Several adapters on one model: which are active and which are trained after each is added."""

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramlora as pl
from tests.support.reference import shake

Task = tuple[str, Tensor, Tensor]


def base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def with_two(**options: Any) -> Any:
    """Return a model with "a", then "b" added with these options, their factors random."""
    model = base()
    pl.attach(model, pl.LoRA(2), name="a")
    shake(model)
    pl.attach(model, pl.LoRA(2), name="b", **options)
    return model


def trained(model: nn.Module) -> dict[str, bool]:
    """Return whether each adapter and the base are trained."""
    flags = {name: pl.parameters(model, name)[0].requires_grad for name in pl.names(model)}
    factors = {id(p) for p in (pl.parameters(model) if flags else [])}
    return flags | {
        "base": any(p.requires_grad for p in model.parameters() if id(p) not in factors)
    }


def tasks() -> list[Task]:
    """Return three tasks that contradict each other: labels of the same inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=generator)
    return [(name, x, torch.randint(3, (48,), generator=generator)) for name in "abc"]


def loss_on(model: nn.Module, task: Task) -> Tensor:
    return nn.functional.cross_entropy(model(task[1]), task[2])


def train(model: nn.Module, parameters: list[nn.Parameter], task: Task) -> float:
    """Train on a task; return the loss at the end."""
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss_on(model, task).backward()
        optimizer.step()
    return loss_on(model, task).item()


def test_loop_over_tasks(tmp_path: Path) -> None:
    """In a loop of attach, train, save, each file alone reaches the loss it had in training."""
    model, losses = base(), {}
    plain = copy.deepcopy(model)
    for task in tasks():
        name = task[0]
        pl.attach(model, pl.LoRA(rank=4), name=name)
        losses[name] = train(model, pl.parameters(model, name), task)
        pl.save(model, tmp_path / name, name)
    for task in tasks():
        fresh = copy.deepcopy(plain)
        start = loss_on(fresh, task).item()
        pl.load(fresh, tmp_path / task[0])
        assert loss_on(fresh, task).item() == pytest.approx(losses[task[0]], rel=1e-5)
        assert losses[task[0]] < 0.8 * start


def test_two_adapters_apart_and_together() -> None:
    """After a second adapter, `using` gives each alone as it was trained, and both as their sum."""
    model = base()
    first, second, _ = tasks()
    pl.attach(model, pl.LoRA(rank=4), name="worst")
    alone = train(model, pl.parameters(model, "worst"), first)
    pl.attach(model, pl.LoRA(rank=4), name="rest")
    other = train(model, pl.parameters(model, "rest"), second)
    weights = []
    for names in (["worst"], ["rest"], ["worst", "rest"], []):
        with pl.using(model, *names):
            weights.append(model[0].weight.detach().double())
            if names == ["worst"]:
                assert loss_on(model, first).item() == pytest.approx(alone, rel=1e-5)
            if names == ["rest"]:
                assert loss_on(model, second).item() == pytest.approx(other, rel=1e-5)
    one, two, both, off = weights
    torch.testing.assert_close(both - off, (one - off) + (two - off), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("activate", "active", "off", "flags"),
    [
        ("only", ("b",), ("a",), {"a": False, "b": True, "base": False}),
        ("also", ("a", "b"), (), {"a": False, "b": True, "base": False}),
        ("no", ("a",), (), {"a": True, "b": True, "base": False}),
    ],
)
def test_attaching_a_second_adapter(
    activate: Any, active: tuple[str, ...], off: tuple[str, ...], flags: dict[str, bool]
) -> None:
    """`activate` says which adapters are active; one that is active alone starts at the base."""
    model, x = base(), torch.randn(4, 6)
    plain = copy.deepcopy(model).requires_grad_(False)
    pl.attach(model, pl.LoRA(2), name="a")
    shake(model)
    before = model(x)
    found = pl.attach(model, pl.LoRA(2), name="b", activate=activate)
    assert (found.active, found.switched_off) == (active, off)
    assert pl.summary(model).active == active
    assert pl.summary(model).switched_off == ()
    assert trained(model) == flags
    assert torch.equal(model(x), plain(x) if activate == "only" else before)


def test_the_default_is_only() -> None:
    """By default a new adapter is the only active one, and the summary says so in words."""
    model = base()
    pl.attach(model, pl.LoRA(2), name="a")
    found = pl.attach(model, pl.LoRA(2), name="b")
    assert "\nactive: b; switched off by this call: a\n" in str(found)
    assert "\nactive: b\n" in str(pl.summary(model))
    pl.disable(model)
    assert "\nactive: none\n" in str(pl.summary(model))


@pytest.mark.parametrize("activate", ["only", "also"])
def test_detach_gives_back_the_flags_of_other_adapters(activate: Any) -> None:
    """Detaching an adapter trains the ones again that it froze, unless another one froze them."""
    model = with_two(activate=activate)
    pl.attach(model, pl.LoRA(1), "0", name="c", activate=activate)
    assert trained(model) == {"a": False, "b": False, "c": True, "base": False}
    pl.detach(model, "b")
    assert trained(model) == {"a": False, "c": True, "base": False}
    pl.detach(model, "c")
    assert trained(model) == {"a": True, "base": False}
    pl.detach(model)
    assert trained(model) == {"base": True}


def test_frozen_by_hand() -> None:
    """What the user froze stays frozen after detach, and what the user unfroze stays trained."""
    model = with_two()
    pl.freeze(model, "a")
    pl.attach(model, pl.LoRA(1), name="c")
    pl.unfreeze(model, "b")
    pl.detach(model, "c")
    assert trained(model) == {"a": False, "b": True, "base": False}
    pl.detach(model, "b")
    assert trained(model) == {"a": False, "base": False}


def test_without_freezing() -> None:
    """With freeze=False neither the base nor other adapters are frozen."""
    model = base()
    pl.attach(model, pl.LoRA(2), name="a", freeze=False)
    pl.attach(model, pl.LoRA(2), name="b", freeze=False)
    assert trained(model) == {"a": True, "b": True, "base": True}


def test_frozen_flags_in_a_copy() -> None:
    """A deep copy gives the flags back on its own."""
    model = with_two()
    other = copy.deepcopy(model)
    pl.detach(other, "b")
    assert trained(other) == {"a": True, "base": False}
    assert trained(model) == {"a": False, "b": True, "base": False}


def test_warning_for_an_adapter_of_other_tensors() -> None:
    """Switching off one that shares no tensor with the new adapter warns and says what to do."""
    model = base()
    pl.attach(model, pl.LoRA(2), name="weights")
    said = "'biases' is now the only active.*'weights'.*\"also\""
    with pytest.warns(UserWarning, match=said) as caught:
        pl.attach(model, pl.Delta(), "*.bias", name="biases")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.attach(model, pl.Delta(), ["*.bias", "0.weight"], name="both")  # nothing apart was on
        pl.activate(model, "weights", "biases")
        pl.attach(model, pl.LoRA(1), name="more", activate="also")
        pl.attach(model, pl.LoRA(1), name="off", activate="no")


def test_only_beside_a_merged_adapter() -> None:
    """ "only" raises while another adapter is merged; "also" and "no" work."""
    model = with_two(activate="no")
    pl.merge(model, "a")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(pl.StateError, match="'c' the only active adapter while 'a' is merged"):
        pl.attach(model, pl.LoRA(1), name="c")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    pl.attach(model, pl.LoRA(1), name="c", activate="also")
    assert pl.attach(model, pl.LoRA(1), name="d", activate="no").active == ("a", "c")


CALLS: dict[str, Callable[[nn.Module, Path, Any], object]] = {
    "attach": lambda model, path, how: pl.attach(model, pl.LoRA(1), name="new", activate=how),
    "load": lambda model, path, how: pl.load(model, path / "file", name="new", activate=how),
    "load_peft": lambda model, path, how: pl.load_peft(
        model, path / "folder", name="new", activate=how
    ),
    "combine": lambda model, path, how: pl.combine(model, {"a": 1.0}, name="new", activate=how),
}


@pytest.mark.parametrize("verb", CALLS)
@pytest.mark.parametrize(
    ("activate", "active"), [("only", ("new",)), ("also", ("a", "new")), ("no", ("a",))]
)
def test_all_verbs_that_add_an_adapter(
    verb: str, activate: Any, active: tuple[str, ...], tmp_path: Path
) -> None:
    """`activate` means the same for all verbs that add an adapter; a wrong value is refused."""
    model = base()
    pl.attach(model, pl.LoRA(2), name="a")
    pl.save(model, tmp_path / "file")
    pl.save_peft(model, tmp_path / "folder")
    with pytest.raises(ValueError, match='activate must be "only", "also" or "no", got True'):
        CALLS[verb](model, tmp_path, True)
    assert pl.names(model) == ["a"]
    CALLS[verb](model, tmp_path, activate)
    assert pl.summary(model).active == active


def test_defaults_of_load_and_combine(tmp_path: Path) -> None:
    """The first adapter that is loaded is active; later ones, and combined ones, are not."""
    model = with_two(activate="also")
    pl.save(model, tmp_path / "b", "b")
    pl.save_peft(model, tmp_path / "a", "a")
    fresh = base()
    assert pl.load(fresh, tmp_path / "b").active == ("b",)
    assert pl.load_peft(fresh, tmp_path / "a", name="a").active == ("b",)
    assert pl.combine(fresh, {"a": 1.0, "b": 1.0}, name="ab").active == ("b",)
    assert trained(fresh) == {"b": True, "a": True, "ab": True, "base": False}


def test_loading_into_an_attached_adapter(tmp_path: Path) -> None:
    """Loading new values switches nothing, unless `activate` asks for it."""
    model = with_two()
    pl.save(model, tmp_path / "a", "a")
    assert pl.load(model, tmp_path / "a").active == ("b",)
    assert pl.load(model, tmp_path / "a", activate="also").active == ("a", "b")
    found = pl.load(model, tmp_path / "a", activate="only")
    assert (found.active, found.switched_off) == (("a",), ("b",))
    assert pl.load(model, tmp_path / "a", activate="no").active == ()


def test_activate() -> None:
    """`activate` makes exactly the named adapters active, to stay, and sets strengths."""
    model = with_two()
    pl.attach(model, pl.Delta(), name="task-1", activate="no")
    x = torch.randn(3, 6)
    for names, strengths, active in (
        (["a"], {}, ("a",)),
        (["b"], {"a": 0.5}, ("a", "b")),
        ([{"task-1": 2.0}], {}, ("task-1",)),
        ([{"task-1": 0.5, "a": 1.0}, "b"], {}, ("a", "b", "task-1")),
        ([], {}, ()),
    ):
        with pl.using(model, *names, **strengths):
            expected = model(x)
        pl.activate(model, *names, **strengths)
        assert pl.summary(model).active == active
        assert torch.equal(model(x), expected)
    assert {row.adapter: row.scale for row in pl.summary(model).sites} == {
        "a": 1.0,
        "b": 1.0,
        "task-1": 0.5,
    }


ACTIVATE_ERRORS: list[tuple[list[Any], type[Exception], str]] = [
    (["a", "x"], pl.AdapterNameError, "no adapter 'x' here; attached are: 'a', 'b'"),
    ([{"x": 0.5}], pl.AdapterNameError, "no adapter 'x' here"),
    ([{"a": float("nan")}], ValueError, "a strength must be a finite number, got nan"),
    ([{"a": None}], ValueError, "a strength must be a finite number, got None"),
    ([["a", "b"]], TypeError, "adapter names are separate arguments"),
]


@pytest.mark.parametrize("verb", ["activate", "using"])
@pytest.mark.parametrize(("given", "error", "match"), ACTIVATE_ERRORS)
def test_errors_of_activate(
    verb: str, given: list[Any], error: type[Exception], match: str
) -> None:
    """A wrong name or strength is refused, and nothing is switched."""
    model = with_two()

    def call() -> None:
        block = getattr(pl, verb)(model, *given)
        if verb == "using":
            block.__enter__()

    with pytest.raises(error, match=match):
        call()
    assert pl.summary(model).active == ("b",)


def test_the_only_adapter_needs_no_name(tmp_path: Path) -> None:
    """Where one adapter is meant, no name means the only one, whatever it is called."""
    model = base()
    pl.attach(model, pl.LoRA(2), name="digits")
    assert pl.names(model) == ["digits"]
    state = pl.state_dict(model)
    pl.load_state_dict(model, {key: torch.ones_like(value) for key, value in state.items()})
    assert all(bool((value == 1).all()) for value in pl.state_dict(model, "digits").values())
    pl.save(model, tmp_path / "file")
    pl.save_peft(model, tmp_path / "folder")
    fresh = base()
    assert pl.names(fresh) == []
    pl.load(fresh, tmp_path / "file")
    assert pl.names(fresh) == ["digits"]


NAMELESS: dict[str, Callable[[nn.Module, Path], object]] = {
    "save": lambda model, path: pl.save(model, path / "file"),
    "save_peft": lambda model, path: pl.save_peft(model, path / "folder"),
    "state_dict": lambda model, path: pl.state_dict(model),
    "load_state_dict": lambda model, path: pl.load_state_dict(model, {}),
}


@pytest.mark.parametrize("verb", NAMELESS)
def test_several_adapters_need_a_name(verb: str, tmp_path: Path) -> None:
    """With several adapters or none, a call without a name raises and writes nothing."""
    with pytest.raises(pl.AdapterNameError, match="several adapters: 'a', 'b'; say which one"):
        NAMELESS[verb](with_two(), tmp_path)
    with pytest.raises(pl.AdapterNameError, match="no adapter is attached here; attach or load"):
        NAMELESS[verb](base(), tmp_path)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_forward_visits_the_active_adapter_alone() -> None:
    """With 100 adapters attached, a forward makes the calls that it makes with one."""
    model, x, counts = base(), torch.randn(2, 6), []
    for i in range(100):
        pl.attach(model, pl.LoRA(rank=1), name=f"a{i}")
        if i in (0, 99):
            counts.append(calls(lambda: model(x)))
    assert counts[0] == counts[1] > 0


def calls(act: Callable[[], object]) -> int:
    """Return how many functions of Python and C `act` calls."""
    found = []
    act()  # the first time it may fill caches
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: found.append(event))
    try:
        act()
    finally:
        sys.setprofile(before)
    return sum(event in ("call", "c_call") for event in found)
