"""The text form of an edit and the JSON of a spec: there and back, and what is refused."""

import json

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from ulsam.base.errors import UlsamError
from ulsam.layer.ulsam import ULSAM
from ulsam.model.spec import INTERPOLATIONS, LARGEST_ARGUMENT, Edit, Json, ModelSpec

names = st.from_regex(r"[A-Za-z_*?][A-Za-z0-9_*?]{0,6}(\.[A-Za-z0-9_*?]{1,6}){0,3}", fullmatch=True)
places = st.lists(st.one_of(names, st.integers(1, 18).map(str), st.integers(1, 18).map("{}:1".format)), min_size=1)
forms = st.sampled_from(["equations", "released"])
layers = st.sampled_from(["ulsam", "se", "eca", "cbam", "coord"])
edits = st.one_of(
    st.builds(Edit, st.sampled_from(["replace", "insert"]), places.map(",".join), st.integers(1, 10**6), forms),
    st.builds(Edit, st.just("remove"), places.map(",".join)),
    st.builds(Edit, st.sampled_from(["replace", "insert"]), places.map(",".join), layer=layers),
)


@given(edit=edits)
def test_an_edit_is_its_text(edit):
    assert Edit.parse(str(edit)) == edit
    assert Edit.parse(f"  {str(edit).replace(' ', '   ')} ") == edit


@given(at=st.text(max_size=12), groups=st.integers(-2, 40), form=forms)
def test_an_edit_of_any_text_is_its_text_or_refused(at, groups, form):
    try:
        edit = Edit("insert", at, groups, form)
    except UlsamError as error:
        assert "\n" not in str(error)
        return
    assert Edit.parse(str(edit)) == edit


@given(text=st.text(max_size=40))
def test_any_text_is_an_edit_or_refused_in_one_line(text):
    try:
        edit = Edit.parse(text)
    except UlsamError as error:
        assert "\n" not in str(error)
        return
    assert Edit.parse(str(edit)) == edit


def test_the_text_of_an_edit_is_what_people_write():
    assert str(Edit("replace", "14,17")) == "replace 14,17 g=4"
    assert str(Edit("insert", "17:1", 8, "released")) == "insert 17:1 g=8 form=released"
    assert str(Edit("remove", " 14 , blocks.5.*")) == "remove 14,blocks.5.*"
    assert str(Edit("insert", "17:1", layer="se")) == "insert 17:1 layer=se"
    assert Edit.parse("replace 14,17") == Edit("replace", "14,17", 4, "equations", "ulsam")
    assert Edit.parse("replace layer=ulsam 14 g=8") == Edit("replace", "14", 8)
    assert Edit.parse("insert form=released 17:1 g=2") == Edit("insert", "17:1", 2, "released")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the edit ''"),
        ("replace", "cannot read the edit"),
        ("replace 14 17", "cannot read the edit"),
        ("replace 14 groups=4", "cannot read the edit"),
        ("replace 14 g=four", "cannot read the edit"),
        ("replace 14 g=-4", "cannot read the edit"),
        (f"replace 14 g={'9' * 5000}", "cannot read the edit"),
        ("replace 14 g=0", "groups must be 1 or more"),
        ("explode 14", "unknown edit 'explode'; valid: replace, insert, remove"),
        ("replace 14 form=best", "unknown form 'best'; valid: equations, released"),
        ("replace 14 form=folded", "unknown form 'folded'; valid: equations, released"),
        ("remove 14 g=8", "a removal makes no layer"),
        ("remove 14 g=4", "a removal makes no layer"),
        ("remove 14 form=released", "a removal makes no layer"),
        ("remove 14 layer=se", "a removal makes no layer"),
        ("insert 14 layer=", "unknown layer ''; valid: ulsam, inverted_residual, se, eca, cbam, coord"),
        ("insert 14 layer=bam", "unknown layer 'bam'; valid: ulsam, inverted_residual"),
        ("insert 14 layer=se g=4", "groups and form are for ULSAM alone: the layer se has neither"),
        ("insert 14 layer=se form=equations", "groups and form are for ULSAM alone"),
    ],
)
def test_a_mistaken_text_is_named(text, message):
    with pytest.raises(UlsamError, match=message):
        Edit.parse(text)


@pytest.mark.parametrize("at", ["", "  ", "14 17", "a=b", "a\nb"])
def test_a_place_that_has_no_text_form_is_refused(at):
    with pytest.raises(UlsamError, match="cannot read the place") as caught:
        Edit("replace", at)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [14, None, ["14"]])
def test_a_place_is_text(at):
    with pytest.raises(UlsamError, match="takes a place as text"):
        Edit("replace", at)


def test_an_edit_changes_the_model_as_it_says():
    model = timm.create_model("mobilenetv2_050")
    for text in ["replace 17 g=2 form=released", "remove 14", "insert blocks.2 g=8"]:
        Edit.parse(text).apply(model, (3, 64, 64))
    layer = model.blocks[5][2]
    assert (type(layer), layer.groups, layer.form) == (ULSAM, 2, "released")
    assert type(model.blocks[4][2]).__name__ == "Identity"
    assert model.blocks[2][2].ulsam.groups == 8


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
numbers = st.floats(allow_nan=False, allow_infinity=False)


def json_of(numbers: st.SearchStrategy[int | float]) -> st.SearchStrategy[Json]:
    return st.recursive(
        st.none() | st.booleans() | numbers | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=8,
    )


json_values = json_of(st.integers() | numbers)
arguments = json_of(st.integers(-LARGEST_ARGUMENT, LARGEST_ARGUMENT) | st.floats(-LARGEST_ARGUMENT, LARGEST_ARGUMENT))


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    channels = draw(st.integers(1, 4))
    return ModelSpec(
        base=draw(words),
        classes=tuple(draw(st.lists(words, max_size=5, unique=True))),
        edits=tuple(draw(st.lists(edits, max_size=3))),
        model_args=draw(st.dictionaries(words, arguments, max_size=3)),
        input_size=(channels, draw(st.integers(1, 8192)), draw(st.integers(1, 8192))),
        interpolation=draw(st.sampled_from(INTERPOLATIONS)),
        crop_pct=draw(st.floats(0.1, 1)),
        mean=tuple(draw(st.lists(numbers, min_size=channels, max_size=channels))),
        std=tuple(draw(st.lists(st.floats(1e-9, 1e9), min_size=channels, max_size=channels))),
    )


@given(spec=specs())
def test_a_spec_is_its_json(spec):
    text = spec.to_json()
    assert "\n" not in text
    assert ModelSpec.from_json(text) == spec


@given(junk=json_values, key=st.sampled_from(list(json.loads(ModelSpec("a", ("b",)).to_json()))))
def test_junk_in_any_entry_is_accepted_by_type_or_refused_in_one_line(junk, key):
    data = {**json.loads(ModelSpec("a", ("b",)).to_json()), key: junk}
    try:
        spec = ModelSpec.from_json(json.dumps(data))
    except UlsamError as error:
        assert str(error).startswith("not the spec of a model: ")
        assert "\n" not in str(error)
        assert len(str(error)) < 500
        return
    assert ModelSpec.from_json(spec.to_json()) == spec


@given(text=st.text() | json_values.map(json.dumps))
def test_other_text_is_refused_in_one_line(text):
    with pytest.raises(UlsamError, match=r"^not the spec of a model: ") as caught:
        ModelSpec.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_spec_prints_as_a_few_lines_whatever_its_classes_hold():
    spec = ModelSpec("resnet18", ("a\x1b[2J", "b\nc", *map(str, range(20))), (Edit("insert", "layer1\x1b", 8),))
    lines = str(spec).splitlines()
    assert lines[0].split() == ["base", "resnet18"]
    assert lines[1].split(maxsplit=1) == ["edits", "insert layer1? g=8"]
    assert lines[3] == "classes     22: a?[2J, b?c, 0, 1, 2, 3, 4, 5, ..."
    assert len(lines) == 6
    assert "\x1b" not in str(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (3, 64)}, "input_size is C, H, W"),
        ({"input_size": (3, 64, 9000)}, "each from 1 to 8192"),
        ({"input_size": (3, 64.0, 64)}, "input_size is C, H, W"),
        ({"crop_pct": 0.0}, "crop_pct is between 0.1 and 1.5, not 0.0"),
        ({"crop_pct": 1e-9}, "crop_pct is between 0.1 and 1.5"),
        ({"crop_pct": 1.51}, "crop_pct is between 0.1 and 1.5"),
        ({"interpolation": "cubic"}, "interpolation is one of nearest, bilinear, bicubic, .*, not 'cubic'"),
        ({"interpolation": "random"}, "interpolation is one of"),
        ({"classes": ("a", "b", "a")}, "two classes are called 'a'"),
        ({"model_args": {"in_chans": 1}}, "in_chans 1 is not input_size's 3"),
        ({"model_args": {"depth": 10**8}}, "no argument of a model may be above 10000, but one is 100000000"),
        ({"model_args": {"a": [1, {"b": -1e6}]}}, "but one is 1000000.0"),
        ({"model_args": {"a": float("inf")}}, "but one is inf"),
        ({"mean": (0.5,)}, "3 channels need as many means"),
        ({"std": (0.5, 0.5, 0.0)}, "stds above 0"),
        ({"std": (0.5, 0.5, float("inf"))}, "stds above 0"),
        ({"mean": (0.5, 0.5, float("nan"))}, "3 channels need"),
    ],
)
def test_mistaken_data_settings_are_named(change, message):
    with pytest.raises(UlsamError, match=message):
        ModelSpec(**{"base": "resnet18", "classes": ("a",), **change})
