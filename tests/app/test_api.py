"""The running app over HTTP and through gradio_client: what it answers, and what it does with hostile input."""

import json
import math
import threading
import time
import urllib.error
import urllib.request

import pytest

from comfy_sage3.app import kept
from comfy_sage3.app.blind import VOTES_FILE
from comfy_sage3.app.form import BUNDLED_GRAPH, WORKFLOWS
from comfy_sage3.demo.sizes import Size

from .conftest import PROMPT, FakeEngine

SMALL = [PROMPT, "", 1, 2, 3, "32x32", 5, "exact", "fp4", None, None, "", "", 1, "embedded", "", BUNDLED_GRAPH, None]
AT = {"prompt": 0, "negative": 1, "seed": 2, "steps": 3, "cfg": 4, "size": 5, "frames": 6, "a": 7, "b": 8, "plan_a": 9}
AT |= {"saved_a": 11, "repeats": 13, "engine": 14, "server": 15, "workflow": 16, "uploaded": 17}


@pytest.fixture
def client(app):
    gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    made = gradio_client.Client(app[0], verbose=False)
    yield made
    made.close()


def fetch(url, **headers):
    """(status, headers, body)"""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_a_comparison_through_the_api_streams_and_is_kept(client, app):
    job = client.submit(*SMALL, api_name="/compare")
    job.result(timeout=120)
    told = job.outputs()
    assert told[-1][1][0]["kind"] == "verdict"
    player = told[-1][2]
    assert (player["frames"], player["width"], player["worst"]) == (5, 32, 2)
    assert player["labels"] == ["A: exact", "B: fp4 (emulated)"]
    assert [math.isfinite(x) for x in player["psnr"] if x is not None]
    runs = [path.name for path in app[1].out.iterdir() if path.is_dir()]
    assert kept.load(runs[0], app[1].out).metrics["request"]["steps"] == 2
    text = json.dumps(told[-1][4])
    assert "emulated: quality is real, speed is not" in text
    assert "as fast as" not in text  # no speed-up where the speed is not real
    assert "<b>no device</b>" in json.dumps(told[-1])  # as data: the page makes a text node of it


def test_real_kernels_get_a_speed_up(client):
    job = client.submit(*[*SMALL[:8], "int8", *SMALL[9:]], api_name="/compare")
    job.result(timeout=120)
    assert "sampling: B is 2.00x as fast as A" in json.dumps(job.outputs()[-1][4])


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", 10**9, "steps|maximum"),
        ("steps", -1, "steps|minimum"),
        ("steps", float("nan"), "steps|number|NaN|minimum|JSON"),
        ("seed", 2**90, "seed"),
        ("cfg", 1e300, "guidance|maximum"),
        ("size", "100000x16", "size"),
        ("size", "${7*7}", "size"),
        ("frames", 10**6 + 1, "frames|choices"),
        ("a", "pickle", "precision|choices"),
        ("repeats", 1000, "timed runs|maximum"),
        ("prompt", "<img src=x onerror=alert(1)>", "does not know"),
        ("prompt", "${alert(1)} {{constructor}}", "does not know"),
        ("prompt", "a red circle " * 9000, "500|length"),
        ("engine", "file:///etc/passwd", "address|choices"),
    ],
)
def test_what_is_out_of_range_or_hostile_is_refused_with_a_sentence(client, name, value, says):
    given = list(SMALL)
    given[AT[name]] = value
    with pytest.raises(Exception, match=f"(?i){says}") as refused:
        client.predict(*given, api_name="/compare")
    assert "Traceback" not in str(refused.value)


def raw(address, name, data):
    """The last event of a call as a browser would make it, without gradio_client's own handling of files."""
    (index,) = [d["id"] for d in json.loads(fetch(f"{address}config")[2])["dependencies"] if d["api_name"] == name]
    body = json.dumps({"data": data, "fn_index": index, "session_hash": f"raw{time.monotonic_ns()}"}).encode()
    session = json.loads(body)["session_hash"]
    request = urllib.request.Request(f"{address}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30):
        pass
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=60) as events:
        for line in events:
            event = json.loads(line[5:]) if line.startswith(b"data:") else {}
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("the call did not end")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../etc/passwd", "/proc/self/environ", "http://127.0.0.1:1/plan.json"]
)
def test_a_file_of_the_servers_is_not_read_as_an_upload(app, path):
    given = list(SMALL)
    given[AT["a"]] = "plan"
    given[AT["plan_a"]] = {"path": path, "meta": {"_type": "gradio.FileData"}}
    ended = raw(app[0], "compare", given)
    assert ended["success"] is False
    assert "root:" not in json.dumps(ended)
    assert "PATH=" not in json.dumps(ended)
    assert "not a precision plan" not in json.dumps(ended)  # it was not even opened


@pytest.mark.parametrize("text", ["NaN", "1e999", "true", '"12"', "null", "[1]", "{}"])
def test_what_is_no_number_is_refused_whatever_json_it_is(app, text):
    given = list(SMALL)
    given[AT["steps"]] = json.loads(text.replace("1e999", "Infinity"))
    assert raw(app[0], "compare", given)["success"] is False


def test_only_its_own_files_are_served(app):
    address, services = app
    (services.out / "note.txt").parent.mkdir(parents=True, exist_ok=True)
    (services.out / "note.txt").write_text("secret")
    for path in (
        "/etc/passwd",
        "pyproject.toml",
        services.out / "note.txt",
        f"{services.out}/../runs/note.txt",
        "https://example.org/",
    ):
        status, _, body = fetch(f"{address}gradio_api/file={path}")
        assert status in (400, 403, 404), path
        assert b"secret" not in body
        assert b"root:" not in body
    assert fetch(f"{address}monitoring")[0] in (403, 404)


def test_a_foreign_host_is_not_answered_and_every_answer_says_load_nothing_from_elsewhere(app):
    status, _, body = fetch(app[0], Host="evil.example")
    assert status == 421
    assert b"gradio" not in body
    status, headers, _ = fetch(app[0])
    assert status == 200
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_uploads_are_bounded(app):
    boundary = "x" * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.json"\r\n\r\n'.encode()
    body = head + b"0" * (app[1].limits.upload_bytes + 1000) + f"\r\n--{boundary}--\r\n".encode()
    request = urllib.request.Request(
        f"{app[0]}gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 413


def test_no_analytics_no_share_no_history_of_gradios(app):
    config = json.loads(fetch(f"{app[0]}config")[2])
    assert config["analytics_enabled"] is False
    assert not config.get("run_history")
    assert not config.get("share_url")
    assert config.get("enable_monitoring") in (None, False)


def test_a_blind_vote_through_the_api_is_kept_and_cannot_be_given_twice(client, app):
    client.predict(*SMALL, api_name="/compare")
    before = len(json.loads((app[1].out / VOTES_FILE).read_text())) if (app[1].out / VOTES_FILE).exists() else 0
    with pytest.raises(Exception, match="nothing to vote on"):
        client.predict(api_name="/blind_vote_first")
    shown = client.predict(api_name="/blind_start")
    assert shown[0]["labels"] == ["First", "Second"]
    assert "exact" not in json.dumps({k: v for k, v in shown[0].items() if k != "sheets"})
    with pytest.raises(Exception, match="Vote first"):
        client.predict(api_name="/blind_reveal")
    client.predict(api_name="/blind_vote_first")
    revealed = client.predict(api_name="/blind_reveal")
    assert {"A: exact", "B: fp4 (emulated)"} == {label.split(" was ")[1] for label in revealed[0]["labels"]}
    with pytest.raises(Exception, match="nothing to vote on"):
        client.predict(api_name="/blind_vote_second")
    assert len(json.loads((app[1].out / VOTES_FILE).read_text())) == before + 1


def test_stop_through_the_api_ends_the_run_and_the_next_one_runs(launch):
    gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    address, services = launch(pause=0.3)
    client = gradio_client.Client(address, verbose=False)
    job = client.submit(*[*SMALL[:3], 50, *SMALL[4:]], api_name="/compare")
    wait_for(lambda: any("step" in json.dumps(x[0]) for x in job.outputs()))
    assert client.predict(api_name="/stop") == "stopping"
    job.result(timeout=60)
    assert job.outputs()[-1][0]["doing"].startswith("Stopped")
    assert not services.out.exists() or not list(services.out.iterdir())
    assert services.gpu.acquire(timeout=10)
    services.gpu.release()
    assert client.predict(api_name="/stop") == "nothing runs"
    client.close()


def test_a_client_that_leaves_ends_its_run(launch):
    gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    address, services = launch(pause=0.3)
    client = gradio_client.Client(address, verbose=False)
    job = client.submit(*[*SMALL[:3], 100, *SMALL[4:]], api_name="/compare")
    wait_for(lambda: any("step" in json.dumps(x[0]) for x in job.outputs()))
    job.cancel()
    client.close()
    assert services.gpu.acquire(timeout=30)
    services.gpu.release()


def test_a_full_queue_is_said_to_be_full(launch):
    from comfy_sage3.app.services import Limits

    gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    address, _ = launch(pause=0.2, limits=Limits(queue=0))  # two places are left for the API
    clients = [gradio_client.Client(address, verbose=False) for _ in range(5)]
    jobs = []
    for client in clients:
        jobs.append(client.submit(*[*SMALL[:3], 8, *SMALL[4:]], api_name="/compare"))
        time.sleep(0.3)
    said = [str(job.exception(timeout=120)) for job in jobs]
    assert said[0] == "None"
    assert any("full" in text.lower() for text in said)
    for client in clients:
        client.close()


def wait_for(true, seconds=30):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def test_two_clients_at_once_each_get_their_own(app):
    gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    found = {}

    def one(seed):
        client = gradio_client.Client(app[0], verbose=False)
        found[seed] = client.predict(*[*SMALL[:2], seed, *SMALL[3:]], api_name="/compare")
        client.close()

    threads = [threading.Thread(target=one, args=(seed,)) for seed in (11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed, values in found.items():
        assert f"seed {seed}" in json.dumps(values[1])
    assert len(found) == 2


def test_an_uploaded_workflow_is_checked_and_reaches_the_server_with_its_own_settings(launch, tmp_path):
    gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    asked = []

    class Served(FakeEngine):
        def check(self, request, sides):
            asked.append((request.given, sides))
            self.size = Size(32, 32, 5)

    address, _ = launch(open_workflow=lambda url, given: asked.append(url) or Served())
    client = gradio_client.Client(address, verbose=False)
    workflow = json.loads((WORKFLOWS / "flux_dev_text_to_image.json").read_text("utf-8"))
    (attention,) = (n for n in workflow.values() if n["class_type"] == "Sage3Attention")
    attention["inputs"] |= {"min_tokens": 77, "emulate": True}
    good, bad = tmp_path / "mine.json", tmp_path / "bad.json"
    good.write_text(json.dumps(workflow))
    attention["class_type"] = "RunShell"
    bad.write_text(json.dumps(workflow))
    given = [*SMALL[:14], "server", "http://127.0.0.1:8188", BUNDLED_GRAPH]
    told = client.predict(*given, gradio_client.handle_file(good), api_name="/compare")
    assert asked[0] == "http://127.0.0.1:8188"
    read, (a, b) = asked[1]
    assert read.name == "mine.json"
    assert (a.min_tokens, a.emulate, b.precision.value) == (77, True, "fp4")
    assert told[1][0]["kind"] == "verdict"
    with pytest.raises(Exception, match="RunShell"):
        client.predict(*given, gradio_client.handle_file(bad), api_name="/compare")
    assert len(asked) == 2  # nothing of it was sent
    client.close()
