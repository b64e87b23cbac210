"""Networks whose layers have different mixers: their facts, and windows put in their place."""

from jaxvid.mixers import Stack, kinds, through_window


def test_the_facts_of_a_stack_are_those_of_all_its_layers():
    shared = dict(width=16, heads=2)
    anchored = {"window": 5, "sinks": 2, "positions": "anchored"}
    for section, window, constant, sums_up, sinks in (
        ({"name": "softmax", "window": 3}, 3, True, False, 0),
        ({"name": "softmax"}, None, False, False, 0),
        ({"name": "softmax", **anchored}, 5, True, False, 2),
        ({"name": "gla", "every": 0, "attention": {"window": 2}}, None, True, True, 0),
        ({"name": "gla", "every": 3, "attention": anchored}, 5, True, True, 0),
        ({"name": "lightnet", "every": 2}, None, False, True, 0),
    ):
        stack = Stack(section, **shared)
        facts = (stack.window, stack.constant_state, stack.sums_up, stack.anchored_sinks)
        assert facts == (window, constant, sums_up, sinks), section
        assert stack.streams
    full = {"name": "gla", "every": 2, "attention": {"mask": "full"}}
    assert not Stack(full, **shared).streams
    assert [kind["name"] for kind in kinds({"name": "gla", "every": 3})] == ["gla"] * 2 + [
        "softmax"
    ]


def test_another_window_goes_to_the_layers_that_have_one():
    cyclic = {"window": 5, "sinks": 2, "positions": "cyclic"}
    seen = through_window({"name": "softmax", **cyclic}, 3, 0)
    assert seen == {"name": "softmax", "positions": "cyclic", "window": 3, "sinks": 0, "cycle": 7}
    assert through_window({"name": "gla"}, 3, 0) == {"name": "gla"}
    hybrid = {"name": "gla", "every": 2, "attention": cyclic}
    wanted = {"positions": "cyclic", "window": 3, "sinks": 2, "cycle": 7}
    assert through_window(hybrid, 3) == {"name": "gla", "every": 2, "attention": wanted}
    assert through_window({"name": "gla", "every": 2}, 3)["attention"] == {"window": 3}
    unused = {"name": "gla", "every": 0, "attention": cyclic}
    assert through_window(unused, 3) == unused
