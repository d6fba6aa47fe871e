# SPDX-License-Identifier: BSD-3-Clause
"""The slot, its moves, its limits, and what a claim may ask for."""

import pytest

from nbagent.core.errors import IllegalMove, InvalidField
from nbagent.core.model import (
    CLAIM_FIELDS,
    MOVES,
    Bounds,
    Limits,
    Slot,
    SlotState,
    claim_link,
    is_slot_id,
    new_id,
    new_token,
    parse_options,
)

BOUNDS = Bounds(memory_max_bytes=4 << 30, ttl_max_s=86400, cpus=2, networks=("none",))


def make_slot(**changes):
    fields = {
        "id": "c07-x8q2m4k9w1ze", "image": "minimal", "digest": "d", "id_base": 1 << 30, "uid": 2001,
        "state": SlotState.WARM, "limits": Limits(1 << 30, 100, None, 256), "token": "t", "created_s": 10.0,
    }
    return Slot(**{**fields, **changes})


def test_every_state_but_gone_has_moves():
    assert set(MOVES) == set(SlotState)
    assert [state for state, moves in MOVES.items() if not moves] == [SlotState.GONE]


def test_every_live_state_can_fail_and_every_end_leads_to_gone():
    for state in (SlotState.STARTING, SlotState.WARM, SlotState.CLAIMED):
        assert SlotState.FAILED in MOVES[state]
    assert MOVES[SlotState.STOPPING] == MOVES[SlotState.FAILED] == {SlotState.GONE}


def test_an_illegal_move_raises_and_changes_nothing():
    slot = make_slot(state=SlotState.STOPPING)
    with pytest.raises(IllegalMove, match="stopping and cannot become claimed"):
        slot.to(SlotState.CLAIMED)
    assert slot.state is SlotState.STOPPING


def test_a_slot_is_restored_from_its_file():
    slot = make_slot(state=SlotState.CLAIMED, claimed_s=20.0, ttl_s=60.0, pid=77, key="k", fingerprint="f")
    assert Slot.restore(slot.save()) == slot


@pytest.mark.parametrize("saved", [{}, {"state": "warm"}, {**make_slot().save(), "state": "asleep"},
                                   {**make_slot().save(), "surprise": 1}])
def test_a_broken_file_is_not_a_slot(saved):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Slot.restore(saved)


def test_only_the_claim_document_shows_the_token():
    slot = make_slot(state=SlotState.CLAIMED, claimed_s=20.0, ttl_s=60.0, token="secret-token")
    assert slot.claim_document()["token"] == "secret-token"
    assert "secret-token" not in str(slot.document(30.0))
    assert slot.document(30.0)["age_s"] == 10.0


def test_ids_have_the_label_and_are_unique():
    ids = {new_id("c07") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_slot_id(one) and one.startswith("c07-") for one in ids)


@pytest.mark.parametrize("text", ["", "c07", "c07-", "c07-../../etc/pas", "C07-x8q2m4k9w1ze", "c07-x8q2m4k9w1ze\n",
                                  "c07-x8q2m4k9w1zee", "a-label-x8q2m4k9w1ze"])
def test_malformed_ids(text):
    assert not is_slot_id(text)


def test_tokens_are_long_and_url_safe():
    assert len(new_token()) == 43 and new_token() != new_token()


def test_options_are_typed_from_a_query_string_and_from_json_alike():
    json = {"memory": 1 << 29, "cpu_weight": 50, "ttl": 60, "cpu_quota": "1/4"}
    query = {"memory": "512M", "cpu_weight": "50", "ttl": "1min", "cpu_quota": "50%"}
    from_json = parse_options(json, CLAIM_FIELDS, BOUNDS)
    from_query = parse_options(query, CLAIM_FIELDS, BOUNDS)
    assert from_json == from_query
    assert from_json.limits(Limits(1, 1, None, 9)) == Limits(1 << 29, 50, 0.5, 9)


def test_limits_without_an_option_are_the_default():
    assert parse_options({}, CLAIM_FIELDS, BOUNDS).limits(Limits(5, 6, 0.7, 8)) == Limits(5, 6, 0.7, 8)


@pytest.mark.parametrize(("field", "value"), [
    ("memory", "-1"), ("memory", "1e9G"), ("memory", "lots"), ("memory", "5G"), ("memory", 0), ("memory", None),
    ("memory", True), ("memory", 1.5), ("memory", "9" * 400), ("cpu_quota", "3/2"), ("cpu_quota", "201%"),
    ("cpu_quota", "1/0"), ("cpu_quota", "0%"), ("cpu_quota", 0.5), ("ttl", 0), ("ttl", "0s"), ("ttl", "25h"),
    ("ttl", -1), ("ttl", "soon"), ("ttl", float("inf")), ("cpu_weight", 0), ("cpu_weight", 10001),
    ("cpu_weight", "heavy"), ("image", "../minimal"), ("image", ["minimal"]), ("path", "../../etc"),
    ("path", "lab/%2e%2e/x"), ("path", "//evil.example"), ("path", "lab\r\nX: y"), ("path", ""), ("path", 7),
])
def test_a_bad_option_names_its_field_and_the_expected_value(field, value):
    with pytest.raises(InvalidField) as caught:
        parse_options({field: value}, CLAIM_FIELDS, BOUNDS)
    assert caught.value.details["field"] == field
    assert caught.value.details["expected"]
    assert len(str(caught.value.details["value"])) <= 80


@pytest.mark.parametrize(("given", "path"), [
    ("lab/tree/My notebook.ipynb", "lab/tree/My%20notebook.ipynb"), ("/lab/tree/ü.ipynb", "lab/tree/%C3%BC.ipynb"),
    ("lab/tree/a%20b.ipynb?x=%26#one", "lab/tree/a%20b.ipynb?x=%26#one"), ("lab\\x", "lab%5Cx"),
])
def test_a_path_is_encoded_as_browsers_encode_it(given, path):
    options = parse_options({"path": given}, CLAIM_FIELDS, BOUNDS)
    assert options.path == path
    assert parse_options({"path": path}, CLAIM_FIELDS, BOUNDS) == options


@pytest.mark.parametrize(("path", "link"), [
    ("/user/x/lab/tree/a.ipynb", "/user/x/lab/tree/a.ipynb?token=t"), ("/user/x/?reset", "/user/x/?reset&token=t"),
    ("/user/x/lab/tree/a.ipynb#one", "/user/x/lab/tree/a.ipynb?token=t#one"),
    ("/user/x/lab?a=1#one?", "/user/x/lab?a=1&token=t#one?"), ("/user/x/a%23b", "/user/x/a%23b?token=t"),
])
def test_the_token_of_a_link_is_before_its_anchor(path, link):
    assert claim_link({"path": path, "query": "token=t"}) == link


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(InvalidField, match=r"unknown field 'mem'.*memory"):
        parse_options({"mem": "1G"}, CLAIM_FIELDS, BOUNDS)
