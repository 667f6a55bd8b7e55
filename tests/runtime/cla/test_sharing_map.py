import pytest

from kvcal.artifacts import KvcalError
from kvcal.runtime.cla import SharingMap


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("0-1,2-3", ((0, 1), (2, 3))),
        ("0,1-3,4", ((0,), (1, 2, 3), (4,))),
        ("5+11,17+23", ((5, 11), (17, 23))),
        ("0", ((0,),)),
    ],
)
def test_text_and_groups_are_each_others_inverse(text, groups):
    assert SharingMap.parse(text) == SharingMap(groups)
    assert str(SharingMap(groups)) == text


def test_other_ways_to_write_the_same_groups():
    assert SharingMap.parse(" 2-3 , 0+1 ") == SharingMap.parse("0-1/2-3") == SharingMap(((0, 1), (2, 3)))


def test_who_stores_and_who_reads():
    of = SharingMap.parse("0-2,3,5-6")
    assert of.storing == (0, 3, 5) and of.reading == (1, 2, 6) and of.shared == ((0, 1, 2), (5, 6))
    assert [of.storing_of(layer) for layer in range(7)] == [0, 0, 0, 3, 4, 5, 5]


@pytest.mark.parametrize("text", ["", "0,,1", "a", "1-0", "1-1", "0-1-2", "0+", "-1", "0:1", "9" * 5000, "٣"])
def test_other_forms_are_refused(text):
    with pytest.raises(KvcalError, match="give layers as 0-1, 0\\+5 or 4"):
        SharingMap.parse(text)


@pytest.mark.parametrize("given", [None, 4, [(0, 1), (2,)], ["0-1", "2"], {"0": 1}])
def test_what_is_no_text_is_refused(given):
    with pytest.raises(KvcalError, match=r"give a text, e\.g\. '0-1,2-3'") as caught:
        SharingMap.parse(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((0, 1), (1, 2)), "layer 1 is in two groups"),
        (((1, 0),), "give its layers in ascending order"),
        (((0, 0),), "give its layers in ascending order"),
        (((),), "give its layers in ascending order"),
    ],
)
def test_groups_that_are_no_partition_are_refused(groups, message):
    with pytest.raises(KvcalError, match=message):
        SharingMap(groups)


@pytest.mark.parametrize(
    ("text", "shareable", "message"),
    [
        ("0-1", range(4), "layers 2, 3 are in none"),
        ("0-1,2-4", range(4), "group 2-4: this model has layers 0 to 3"),
        ("0+2,1+3", range(4), r"group 0\+2: its layers are no neighbours"),
        ("0-1,2,3", [0, 2, 3], "layer 1 has sliding attention, and sliding and full layers never share"),
        ("1-2", [0, 3], "layer 1 has sliding attention"),
        ("0,3", [0, 2, 3], "layers 2 are in none"),
    ],
)
def test_maps_that_do_not_fit_a_model_are_refused(text, shareable, message):
    with pytest.raises(KvcalError, match=message) as caught:
        SharingMap.parse(text).check(list(shareable), 4)
    assert "\n" not in str(caught.value)


def test_maps_that_fit():
    SharingMap.parse("0-1,2-3").check(range(4), 4)
    SharingMap.parse("0+2,3").check([0, 2, 3], 4)  # layer 1 slides and is not in the map
    SharingMap.parse("0+2,1,3").check([0, 2, 3], 4)  # or by itself
    SharingMap(()).check([], 4)
