import pytest

from medgemma_quantization.scheme import FLOAT16, FLOAT32, INT4, INT8, Scheme, Storage, load_scheme
from medgemma_runtime.errors import EdgeError

GOOD = """
name = "head in int8"
linear = { bits = 4, block = 32 }
table = { bits = 8 }
activations = "int8-dynamic"

[[override]]
match = 'text_model\\.head\\..*'
bits = 8
"""


def test_a_scheme_file_says_the_same_as_the_dataclass(tmp_path):
    path = tmp_path / "scheme.toml"
    path.write_text(GOOD)
    assert load_scheme(path) == Scheme(
        name="head in int8",
        linear=INT4,
        table=INT8,
        activations="int8-dynamic",
        overrides=((r"text_model\.head\..*", INT8),),
    )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "head in int8"\n', "", "missing"),
        ("head in int8", "../head", "cannot be part of a file name"),
        ("head in int8", "", "cannot be part of a file name"),
        ("bits = 4", "bits = 5", "bits must be 32, 16, 8 or 4"),
        ("block = 32", "block = 24", "power of two"),
        ("table", "tables", "table"),
        ("match = 'text_model", "match = '(text_model", "no regular expression"),
        ("match =", "matches =", "match"),
        ("name =", "name", "no TOML"),
        ('"int8-dynamic"', '"int7"', "activations must be"),
    ],
)
def test_a_scheme_that_is_off_is_refused_with_the_reason(tmp_path, before, after, message):
    path = tmp_path / "scheme.toml"
    assert before in GOOD
    path.write_text(GOOD.replace(before, after))
    with pytest.raises(EdgeError, match=message):
        load_scheme(path)


def test_an_absent_scheme_file(tmp_path):
    with pytest.raises(EdgeError, match="cannot be read"):
        load_scheme(tmp_path / "none.toml")


def test_names_of_storages():
    assert str(INT4) == "int4 block 32"
    assert str(INT8) == "int8 per channel"
    assert (str(FLOAT32), str(FLOAT16)) == ("float32", "float16")
    with pytest.raises(ValueError, match="block"):
        Storage(bits=32, block=32)


def test_a_scheme_file_may_give_a_decoder_a_storage_of_its_own(tmp_path):
    path = tmp_path / "s.toml"
    text = 'name = "s"\nlinear = { bits = 8 }\ntable = { bits = 4, block = 32 }\nactivations = "float"\n'
    path.write_text(text)
    assert load_scheme(path).decoder is None
    path.write_text(text + "decoder = { bits = 4, block = 64 }\n")
    assert load_scheme(path).decoder == Storage(bits=4, block=64)
