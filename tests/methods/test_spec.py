import pytest

from sparsebench.methods import METHODS
from sparsebench.methods.spec import build, label, parse_methods


def test_names_fields_and_separators():
    methods = parse_methods("dense, minference:vertical=100,slash=600 a_shape:local=512")
    assert methods == [METHODS["dense"](), METHODS["minference"](vertical=100, slash=600), METHODS["a_shape"](local=512)]


def test_types_follow_the_fields(tmp_path):
    for name in ("config.json", "gate.safetensors"):
        (tmp_path / name).touch()
    (seer,) = parse_methods(f"seer:threshold=1e-3,gate={tmp_path},share_gqa=true,last_dense=1")
    assert (seer.threshold, seer.gate, seer.share_gqa, seer.last_dense) == (1e-3, str(tmp_path), True, 1)
    assert parse_methods("seer:threshold=none") == parse_methods("seer")


@pytest.mark.parametrize(
    "text, message",
    [
        ("mineference", "unknown method 'mineference'; did you mean minference?"),
        ("a_shape:lokal=3", "a_shape has no field 'lokal'; did you mean local?"),
        ("a_shape:local=x", "a_shape:local=x is not a whole number"),
        ("minference:vertical=-1", "vertical=-1 is out of range"),
        ("vertical=3", "sets a field of no method"),
        ("dense dense", "listed twice"),
        ("dense:x=1", "dense has no field 'x'"),
    ],
)
def test_bad_input(text, message):
    with pytest.raises(ValueError) as error:
        parse_methods(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_params_build_the_same_method(name):
    method = METHODS[name]()
    assert build(name, method.params()) == method


def test_label_names_what_differs():
    assert label(METHODS["random"]()) == "random"
    assert label(METHODS["random"](density=0.25)) == "random(density=0.25)"
