"""The workflows for real models, without the models: against the definitions of a real ComfyUI (COMFYUI_PATH)."""

import importlib.util
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from comfy_sage3.workflow import load_workflow, serve
from comfy_sage3.workflow.server import find_python

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
_spec = importlib.util.spec_from_file_location("from_template", FOLDER / "from_template.py")
from_template = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(from_template)

NAMES = sorted(from_template.SHIPPED)
SAMPLERS = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"}
TEMPLATES_OF = "0.33.0"  # the ComfyUI whose templates they were made from
every_workflow = pytest.mark.parametrize("name", NAMES)


def api(name):
    return load_workflow(FOLDER / "api" / f"{name}.json")


def editor(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def client():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: no real ComfyUI to check the workflows against")
    comfyui, python = Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON")
    with serve(comfyui, python=find_python(comfyui, Path(python) if python else None)) as made:
        yield made


@pytest.fixture(scope="module")
def infos(client):
    """What the server knows; an older one lacks nodes and inputs that the templates use."""
    version = client.system_stats()["system"]["comfyui_version"]
    if tuple(map(int, version.split("."))) < tuple(map(int, TEMPLATES_OF.split("."))):
        pytest.skip(f"the workflows are made from the templates of ComfyUI {TEMPLATES_OF}; this one is {version}")
    return from_template.fetch(client.url, "/object_info")


@pytest.fixture
def own_templates(client):
    version = client.system_stats()["system"]["comfyui_version"]
    if version != TEMPLATES_OF:
        pytest.skip(f"the workflows are made from the templates of ComfyUI {TEMPLATES_OF}; this one is {version}")
    return lambda name: from_template.Graph(from_template.fetch(client.url, f"/templates/{name}.json"))


@every_workflow
def test_every_sampler_has_our_nodes_on_both_sides(name):
    made = api(name)

    def upstream(value):
        return made[value[0]]

    samplers = {key: node["inputs"] for key, node in made.items() if node["class_type"] in SAMPLERS}
    assert samplers
    for key, inputs in samplers.items():
        guided = upstream(inputs["guider"])["inputs"] if "guider" in inputs else inputs
        assert upstream(guided["model"])["class_type"] == "Sage3Attention"
        (report,) = [n["inputs"] for n in made.values() if n["inputs"].get("latent", [None])[0] == key]
        assert report["model"] == guided["model"]
    kinds = [n["class_type"] for n in made.values()]
    assert kinds.count("Sage3Attention") == kinds.count("Sage3Report") == len(samplers)


@every_workflow
def test_the_editors_links_are_sound(name):
    saved = editor(name)
    nodes = {n["id"]: n for n in saved["nodes"]}
    assert saved["last_node_id"] == max(nodes)
    assert saved["last_link_id"] == max(x[0] for x in saved["links"])
    ends = {(x["link"], n["id"], i) for n in nodes.values() for i, x in enumerate(n.get("inputs", [])) if x["link"]}
    begins = {
        (link, n["id"], i) for n in nodes.values() for i, x in enumerate(n.get("outputs", [])) for link in x["links"] or []
    }
    assert {(i, target, slot) for i, _, _, target, slot, _ in saved["links"]} == ends
    assert {(i, origin, output) for i, origin, output, *_ in saved["links"]} == begins
    boxes = [(n["pos"], n["size"]) for n in nodes.values()]
    ours = [(n["pos"], n["size"]) for n in nodes.values() if n["type"].startswith("Sage3")]
    for box in ours:
        assert sum(from_template._overlap(*box, *other, gap=0) for other in boxes) == 1  # itself


@every_workflow
def test_both_formats_hold_the_same_graph(infos, name):
    assert from_template.Graph(editor(name)).api(infos) == api(name)


@every_workflow
def test_nodes_inputs_and_links_are_those_of_the_server(infos, name):
    made = api(name)
    for key, node in made.items():
        assert node["class_type"] in infos
        spec = infos[node["class_type"]]["input"]
        known = spec.get("required", {}) | spec.get("optional", {})
        for given, value in node["inputs"].items():
            where = f"node {key} ({node['class_type']}), input {given}"
            assert given.split(".")[0] in known, where
            if isinstance(value, list):
                kind = known[given.split(".")[0]][0]
                source = infos[made[value[0]]["class_type"]]
                assert fits(source["output"][value[1]], kind), where


def fits(output, wanted):
    if output.startswith(("*", "COMFY_")) or not isinstance(wanted, str) or wanted.startswith(("*", "COMFY_")):
        return True  # decided by what is connected
    return bool(set(output.split(",")) & set(wanted.split(",")))


@every_workflow
def test_the_server_finds_nothing_wrong_but_the_missing_models(client, infos, name):
    """Its own validation, with file names that no one has, so that nothing can start to run."""
    made = api(name)
    files = set()
    for key, node in made.items():
        for given, value in node["inputs"].items():
            if isinstance(value, str) and value.endswith((".safetensors", ".sft", ".ckpt")):
                node["inputs"][given] = "no such file.safetensors"
                files.add((key, given))
    assert files
    request = urllib.request.Request(f"{client.url}/prompt", json.dumps({"prompt": made}).encode())
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    answer = json.loads(refused.value.read())
    found = {
        (key, error["extra_info"]["input_name"]) for key, node in answer["node_errors"].items() for error in node["errors"]
    }
    assert {e["type"] for node in answer["node_errors"].values() for e in node["errors"]} == {"value_not_in_list"}
    assert found <= files


@every_workflow
def test_it_is_comfyuis_template_but_for_our_nodes(own_templates, infos, name):
    """Take ours out again: what remains is the template, node for node and value for value."""
    made = api(name)
    while ours := [key for key, node in made.items() if node["class_type"] in ("Sage3Attention", "Sage3Report")]:
        key = ours[0]
        inputs = made.pop(key)["inputs"]
        through = {0: inputs["model"], 1: inputs.get("latent")}
        for node in made.values():
            for given, value in node["inputs"].items():
                if isinstance(value, list) and value[0] == key:
                    node["inputs"][given] = through[value[1]]
    assert made == own_templates(from_template.SHIPPED[name]).api(infos)


@every_workflow
def test_they_are_what_the_script_makes(own_templates, infos, name):
    graph = own_templates(from_template.SHIPPED[name])
    from_template.insert(graph, infos)
    assert (graph.api(infos), json.loads(json.dumps(graph.save()))) == (api(name), editor(name))


def test_the_template_browser_lists_them_and_serves_them(client):
    listed = from_template.fetch(client.url, "/workflow_templates")["comfy-sage3"]
    assert set(NAMES) <= set(listed)
    for name in listed:  # the browser opens what it lists as the editor's files: a server's would be an empty graph
        served = from_template.fetch(client.url, f"/api/workflow_templates/comfy-sage3/{name}.json")
        assert served == editor(name)
        assert served["nodes"]
        assert (FOLDER / "api" / f"{name}.json").is_file()
