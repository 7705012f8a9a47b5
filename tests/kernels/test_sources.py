"""The table of sources, and what the sources themselves must keep to."""

import re

import pytest

from comfy_sage3.errors import InputError
from comfy_sage3.kernels import sources
from comfy_sage3.kernels.sources import ALL, OLDEST_CUDA, Source, Tree, arch_of, find_tree, gencode, parse_archs

TREE = find_tree()


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("90a", ("90a",)),
        ("90,sm_120, 12.1,8.6", ("90a", "120a", "121a", "86")),
        ("120;120a", ("120a",)),
        ("all", ALL),
    ],
)
def test_architectures_are_written_in_many_ways(text, archs):
    assert parse_archs(text) == archs


@pytest.mark.parametrize("text", ["", "61", "90a,nonsense"])
def test_an_unknown_architecture_is_named_with_the_choice(text):
    with pytest.raises(InputError, match="choose from 75, 80, 86, 89, 90a, 100a, 103a, 120a, 121a or all"):
        parse_archs(text)


def test_every_target_has_its_oldest_cuda_and_a_gencode_without_ptx():
    assert set(OLDEST_CUDA) == set(ALL)
    assert gencode(("90a", "120a")) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120a,code=sm_120a",
    ]
    assert arch_of((9, 0)) == "90a"
    assert arch_of((8, 7)) == "86"
    assert arch_of((13, 0)) is None


def tree(tmp_path, *names, rows=()):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return Tree(tmp_path, rows)


def test_the_first_row_that_matches_decides_and_the_rest_is_for_all(tmp_path):
    rows = (Source("attention/one.cu", ("80",)), Source("attention/*.cu", ("90a", "120a")))
    made = tree(tmp_path, "attention/one.cu", "attention/two.cu", "quantize/three.cu", rows=rows)
    plan = {path.name: archs for path, archs in made.plan(("80", "90a"))}
    assert plan == {"one.cu": ("80",), "two.cu": ("90a",), "three.cu": ("80", "90a")}
    assert [path.name for path, _ in made.plan(("120a",))] == ["two.cu", "three.cu"]


def test_sources_lie_beside_a_checkout_or_inside_an_installed_package(tmp_path):
    package = tmp_path / "comfy_sage3"
    package.mkdir()
    assert find_tree(package) is None
    beside = tree(tmp_path / "csrc", "binding.cpp")
    assert find_tree(package).root == beside.root
    inside = tree(package / "csrc", "binding.cpp")
    assert find_tree(package).root == inside.root


def test_every_row_of_the_table_names_known_architectures():
    for row in sources.SOURCES:
        assert row.archs
        assert set(row.archs) <= set(ALL)


def test_the_backward_kernels_are_in_every_build_for_hopper():
    kernels = sorted((TREE.root / "backward").glob("*.cu"))
    assert "int8_grad_sm90.cu" in [kernel.name for kernel in kernels]
    for rows in (sources.SOURCES, sources.EMULATED):
        plan = dict(Tree(TREE.root, rows).plan(ALL))
        assert [plan[kernel] for kernel in kernels] == [("90a",)] * len(kernels)


@pytest.mark.skipif(TREE is None, reason="there is no csrc yet")
def test_only_the_binding_includes_torch_and_it_takes_its_namespace_from_the_build():
    torch_header = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)")
    seen = {path.relative_to(TREE.root).as_posix() for path in TREE.files() if torch_header.search(path.read_text())}
    assert seen <= {"binding.cpp"}
    if TREE.binding.is_file():
        text = TREE.binding.read_text()
        assert "SAGE3_NAMESPACE" in text
        # Python's headers are missing on many machines, and a library without them serves every Python.
        assert not re.search(r"torch/(extension|python)\.h|pybind11|Python\.h", text)
