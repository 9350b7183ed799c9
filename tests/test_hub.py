"""The hub: adapters come from the cache or a server as two files of one commit, and go up without their base.

huggingface_hub itself does the work here, on a cache laid out by hand and on a small server of this process.
"""

import base64
import hashlib
import http.server
import json
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import foreign_files
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_models import adapted, disturb, foreign_code, gpt2, llama, logits, state_digest, token_ids
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from minipeft import CheckpointError, ConfigError, LoraConfig, StateError, get_lora_model, load_adapter, load_config
from minipeft.files.base_checkpoint import cached

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no way out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(cache, model, repo_id="user/repo", commit=COMMITS[0], ref="main", subfolder=""):
    """What a download leaves: blobs, a snapshot of links to them, and a ref that names the snapshot."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    for folder in ("blobs", "refs", f"snapshots/{commit}/{subfolder}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    saved = cache / "saved"
    model.save_pretrained(saved)
    for name in (WEIGHTS, CONFIG):
        payload = (saved / name).read_bytes()
        blob = root / "blobs" / hashlib.sha256(payload).hexdigest()
        blob.write_bytes(payload)
        link = root / "snapshots" / commit / subfolder / name
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    shutil.rmtree(saved)
    return root


def test_a_base_with_an_old_name_is_found_in_the_cache(cache):
    """As ``gpt2``, without an owner: what its checkpoint has says which rows of a resized vocabulary are new."""
    snapshot = cache / "models--tiny" / "snapshots" / COMMITS[0]
    gpt2().save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMITS[0])
    assert cached("tiny") == snapshot
    assert cached("gone") is None


def test_an_adapter_comes_from_the_cache(cache):
    model = adapted()
    put(cache, model)
    loaded = load_adapter(gpt2(), "user/repo")
    assert torch.equal(logits(loaded), logits(model))
    second = loaded.load_adapter("user/repo", "again", local_files_only=True)
    assert list(second.adapter_configs) == ["default", "again"]


def test_the_configuration_names_the_base_before_it_is_loaded(cache, tmp_path):
    import peft

    model = adapted(base_model_name_or_path="openai-community/gpt2", use_rslora=True)
    put(cache, model)
    model.save_pretrained(tmp_path / "here")
    config = load_config("user/repo", local_files_only=True)
    assert config == load_config(tmp_path / "here")
    assert config == load_adapter(gpt2(), "user/repo").adapter_configs["default"]
    theirs = peft.PeftConfig.from_pretrained(tmp_path / "here")
    assert config.base_model_name_or_path == theirs.base_model_name_or_path == "openai-community/gpt2"
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        load_config(tmp_path)


def test_a_revision_is_a_branch_or_a_commit(cache):
    old, new = adapted(seed=1), adapted(seed=2)
    put(cache, old, commit=COMMITS[0], ref="v1")
    put(cache, new, commit=COMMITS[1])
    for revision, model in ((None, new), ("main", new), ("v1", old), *zip(COMMITS, (old, new), strict=True)):
        assert torch.equal(logits(load_adapter(gpt2(), "user/repo", revision=revision)), logits(model))


def test_a_subfolder_is_looked_into(cache, tmp_path):
    model = adapted()
    put(cache, model, subfolder="deep/other")
    loaded = load_adapter(gpt2(), "user/repo", subfolder="deep/other")
    assert torch.equal(logits(loaded), logits(model))
    model.save_pretrained(tmp_path / "here" / "other")
    loaded = load_adapter(gpt2(), tmp_path / "here", subfolder="other")
    assert torch.equal(logits(loaded), logits(model))


def test_a_directory_wins_over_the_hub(cache, tmp_path):
    here = adapted(seed=2)
    put(cache, adapted(seed=1))
    here.save_pretrained(tmp_path / "user" / "repo")
    assert torch.equal(logits(load_adapter(gpt2(), "user/repo")), logits(here))


def refused(said, *args, error=CheckpointError, **options):
    model = gpt2()
    before = state_digest(model)
    with pytest.raises(error, match=said) as caught:
        load_adapter(model, *args, **options)
    assert state_digest(model) == before
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_what_is_not_in_the_cache_is_told_in_one_line(cache, monkeypatch):
    message = refused("is not a directory here, and its adapter_model.safetensors is not in", "user/absent")
    assert str(cache) in message
    assert "HF_HUB_OFFLINE" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "local_files_only" in refused("not in", "user/absent", local_files_only=True)
    put(cache, adapted())
    refused("not in", "user/repo", revision="v2", local_files_only=True)


@pytest.mark.parametrize(
    "place",
    ["absent", "./absent/x", "absent/deep/er", "/absent/x", "user/..", "-user/repo", "user/repo.git", "user\\x"],
)
def test_what_can_be_no_repository_is_not_asked_for(cache, monkeypatch, place):
    monkeypatch.setattr("minipeft.files.hub.hf_hub_download", None)  # calling it would be another error
    refused("is not a directory; an adapter is a directory with", place)


def test_a_path_object_is_never_a_repository(cache):
    put(cache, adapted())
    refused("is not a directory; an adapter is", Path("user/repo"))


def test_a_directory_has_no_revision_and_a_subfolder_stays_inside(cache, tmp_path):
    adapted().save_pretrained(tmp_path / "here")
    refused("has no revision 'v1'", tmp_path / "here", error=ConfigError, revision="v1")
    for subfolder in ("../here", "/here"):
        refused("must be a path within", "user/repo", error=ConfigError, subfolder=subfolder)


def test_a_pickle_in_the_cache_is_not_read(cache):
    snapshot = put(cache, adapted()) / "snapshots" / COMMITS[0]
    (snapshot / WEIGHTS).rename(snapshot / "adapter_model.bin")
    refused("adapter_model.safetensors is not in", "user/repo")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download and a commit of small files take."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.note(path)
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        if listed:
            commit = self.server.repos[listed[1]].get(listed[2], listed[2])
            files = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.server.trees[commit]]
            return self.send(200, files)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found or found[1] not in self.server.repos:
            return self.fail(404, "Repository not found", "RepoNotFound")
        repo, revision, name = map(unquote, found.groups())
        commit = self.server.repos[repo].get(revision, revision)
        if commit not in self.server.trees:
            return self.fail(404, "Revision not found", "RevisionNotFound")
        if name not in self.server.trees[commit]:
            return self.fail(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        body = self.server.trees[commit][name]
        self.send(200, body, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})
        self.server.after(self.command, name)

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("content-length", 0)))
        self.note(path)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        repo, action, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path).groups()
        if action == "branch":
            self.server.repos[repo][revision] = self.server.repos[repo]["main"]
            return self.send(200, {})
        if action == "preupload":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.send(200, {"files": files})
        return self.commit(repo, revision, [json.loads(line) for line in body.splitlines()])

    def create(self, wanted):
        repo = f"{wanted.get('organization', 'user')}/{wanted['name']}"
        if repo == "user/forbidden":
            return self.fail(403, "You have no right to", "Forbidden")
        self.server.created.append((repo, wanted.get("private") or wanted.get("visibility") == "private"))
        self.server.repos.setdefault(repo, {"main": self.server.empty})
        self.send(200, {"url": f"{constants.ENDPOINT}/{repo}", "name": repo})

    def commit(self, repo, revision, lines):
        branches = self.server.repos[repo]
        tree = dict(self.server.trees[branches[revision]])
        for line in lines:
            if line["key"] == "file":
                tree[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
        pull = "create_pr" in parse_qs(urlsplit(self.path).query)
        branches["refs/pr/1" if pull else revision] = commit = self.server.keep(tree)
        answer = {"commitUrl": f"{constants.ENDPOINT}/{repo}/commit/{commit}", "commitOid": commit}
        self.send(200, {**answer, **({"pullRequestUrl": f"{constants.ENDPOINT}/{repo}/discussions/1"} if pull else {})})

    def note(self, path):
        if path != "/api/agent-harnesses":  # huggingface_hub's own question, once a day and machine
            self.server.log.append((self.command, path, self.headers.get("authorization")))

    def fail(self, status, message, code, headers=None):
        self.send(status, {"error": message}, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message})

    def send(self, status, body, headers=None):
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(payload))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Repositories (branch -> commit), commits (name -> bytes), and what was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.repos, self.trees, self.log, self.created, self.commits = {}, {}, [], [], []
        self.empty = self.keep({})
        self.after = lambda command, name: None

    def keep(self, tree):
        commit = hashlib.sha1(repr(sorted(tree.items())).encode()).hexdigest()
        self.trees[commit] = tree
        return commit

    def files(self, repo, branch="main"):
        return self.trees[self.repos[repo][branch]]

    def put(self, repo, changes):
        self.repos[repo]["main"] = self.keep(
            {k: v for k, v in {**self.files(repo), **changes}.items() if v is not None}
        )


@pytest.fixture
def hub(cache, monkeypatch):
    """A server with no repository; what it was asked for is in `log`."""
    server = Server()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_pushed_is_what_is_loaded_and_it_is_the_adapter_alone(hub):
    model = adapted()
    usual = {"use_auth_token": True, "use_temp_dir": None, "safe_serialization": True, "max_shard_size": "50GB"}
    commit = model.push_to_hub(
        "user/repo", token="hf_secret", private=True, commit_message="first", commit_description="x", **usual
    )
    assert str(commit).endswith(f"/user/repo/commit/{hub.repos['user/repo']['main']}")
    assert set(hub.files("user/repo")) == {WEIGHTS, CONFIG, CARD}
    assert hub.created == [("user/repo", True)]
    assert (hub.commits[0]["summary"], hub.commits[0]["description"]) == ("first", "x")
    assert {token for *_, token in hub.log} == {"Bearer hf_secret"}
    hub.log.clear()
    loaded = load_adapter(gpt2(), "user/repo", token="hf_other")
    assert torch.equal(logits(loaded), logits(model))
    assert {Path(path).name for _, path, _ in hub.log} == {WEIGHTS, CONFIG}
    assert {token for *_, token in hub.log} == {"Bearer hf_other"}
    hub.log.clear()
    load_adapter(gpt2(), "user/repo", local_files_only=True)
    assert hub.log == []


def test_both_files_are_of_one_commit_whatever_is_pushed_meanwhile(hub):
    model, newer = adapted(), adapted(r=2)
    model.push_to_hub("user/repo")
    model.save_pretrained("newer")
    newer.save_pretrained("newer")

    def push(command, name):
        if command == "GET" and name == WEIGHTS:
            hub.put("user/repo", {name: Path("newer", name).read_bytes() for name in (WEIGHTS, CONFIG)})

    hub.after = push
    loaded = load_adapter(gpt2(), "user/repo")
    assert hub.files("user/repo")[CONFIG] == Path("newer", CONFIG).read_bytes()
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(load_adapter(gpt2(), "user/repo")), logits(newer))


def test_several_adapters_are_one_commit_and_each_is_found_again(hub):
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False))
    model.push_to_hub("user/repo")
    assert set(hub.files("user/repo")) == {
        f"{folder}{name}" for folder in ("", "other/") for name in (WEIGHTS, CONFIG, CARD)
    }
    assert len(hub.commits) == 1
    model.set_adapter("other")
    loaded = load_adapter(gpt2(), "user/repo", subfolder="other")
    assert torch.equal(logits(loaded), logits(model))
    model.push_to_hub("user/second", "other")
    assert set(hub.files("user/second")) == {f"other/{name}" for name in (WEIGHTS, CONFIG, CARD)}


def test_a_branch_is_made_and_a_pull_request_leaves_it_alone(hub):
    model = adapted()
    model.push_to_hub("user/repo", revision="v2")
    assert hub.files("user/repo") == {}
    assert set(hub.files("user/repo", "v2")) == {WEIGHTS, CONFIG, CARD}
    commit = model.push_to_hub("user/repo", create_pr=True)
    assert commit.pr_url.endswith("/discussions/1")
    assert hub.files("user/repo") == {}
    assert set(hub.files("user/repo", "refs/pr/1")) == {WEIGHTS, CONFIG, CARD}
    for revision in ("v2", "refs/pr/1"):
        assert torch.equal(logits(load_adapter(gpt2(), "user/repo", revision=revision)), logits(model))
    with pytest.raises(ConfigError, match="leave out revision='v3'"):
        model.push_to_hub("user/repo", create_pr=True, revision="v3")
    assert "v3" not in hub.repos["user/repo"]


def test_a_card_that_somebody_wrote_is_not_overwritten(hub):
    model = adapted()
    model.push_to_hub("user/repo")
    ours = hub.files("user/repo")[CARD]
    assert b"library_name: peft" in ours
    for there, afterwards in ((ours.replace(b"LORA adapter", b"out of date"), ours), (b"# mine", b"# mine")):
        hub.put("user/repo", {CARD: there, CONFIG: b"{}"})
        model.push_to_hub("user/repo")
        assert hub.files("user/repo")[CARD] == afterwards
        assert hub.files("user/repo")[CONFIG] != b"{}"


def test_no_path_of_this_machine_is_published(hub, tmp_path):
    gpt2().save_pretrained(tmp_path / "secret" / "base")
    model = disturb(get_lora_model(GPT2LMHeadModel.from_pretrained(tmp_path / "secret" / "base"), LoraConfig(r=4)))
    model.push_to_hub("user/repo")
    assert not [name for name, payload in hub.files("user/repo").items() if b"secret" in payload]
    assert torch.equal(logits(load_adapter(gpt2(), "user/repo")), logits(model.eval()))
    model.save_pretrained(tmp_path / "here")  # where it is of use
    assert "secret" in (tmp_path / "here" / CONFIG).read_text()
    model.name_or_path = "owner/base"
    model.push_to_hub("user/repo")
    assert json.loads(hub.files("user/repo")[CONFIG])["base_model_name_or_path"] == "owner/base"
    assert b"base_model: owner/base" in hub.files("user/repo")[CARD]


def test_what_the_hub_refuses_is_told_in_one_line(hub, monkeypatch):
    refused(
        r"'user/absent' is not a directory here, and the hub does not give .*RepositoryNotFoundError", "user/absent"
    )
    adapted().push_to_hub("user/repo")
    refused("RevisionNotFoundError", "user/repo", revision="v9")
    hub.put("user/repo", {CONFIG: None, "adapter_model.bin": b""})
    refused("the repository on the hub has no adapter_config.json", "user/repo")
    hub.put("user/repo", {WEIGHTS: None})
    refused("the repository on the hub has no adapter_model.safetensors", "user/repo")
    assert not [path for _, path, _ in hub.log if path.endswith(".bin")]

    def unplugged(*args, **options):
        raise ConnectionError("first line\nsecond line")

    monkeypatch.setattr("minipeft.files.hub.hf_hub_download", unplugged)
    refused(r"the hub does not give its adapter_model.safetensors \(ConnectionError: first line\)", "user/repo")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json", "model-00001-of-00002.safetensors"], "It is a whole model: load it with from_pretrained"),
        (["checkpoint-5/" + WEIGHTS, "checkpoint-5/" + CONFIG], "is in its sub-directory 'checkpoint-5'"),
        ([CONFIG, "pytorch_adapter.bin", "head_config.json"], "AdapterHub"),
        ([CONFIG, "adapter_model.bin", "training_args.bin"], "'adapter_model.bin' is a pickle: download it"),
        (["trainer_state.json", "optimizer.pt", "model.safetensors"], "its trainer saved a whole model"),
        (["llama-q4.gguf"], "GGUF"),
        (["README.md"], "has no adapter_model.safetensors. Nothing was"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_a_repository_without_an_adapter_is_named_as_what_it_is(hub, names, said):
    adapted().push_to_hub("user/repo")
    hub.put("user/repo", dict.fromkeys((WEIGHTS, CONFIG, CARD)))
    hub.put("user/repo", dict.fromkeys(names, b"x"))
    assert "the repository on the hub has no adapter_model.safetensors" in refused(said, "user/repo")


FOREIGN = {"mlx": foreign_files.mlx, "torchtune": foreign_files.torchtune}


@pytest.mark.each_value
@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("inner", ["", "deep/"])
def test_an_adapter_of_another_tool_comes_from_the_hub(case, inner, hub, tmp_path, monkeypatch):
    (tmp_path / "it").mkdir()
    FOREIGN[case](tmp_path / "it")
    expected = load_adapter(llama(), tmp_path / "it")
    adapted().push_to_hub("user/repo")
    files = {f"{inner}{path.name}": path.read_bytes() for path in (tmp_path / "it").iterdir()}
    hub.put("user/repo", dict.fromkeys((WEIGHTS, CONFIG)) | files | {"optimizer.pt": b"x"})
    options = {"subfolder": "deep"} if inner else {}
    loaded = load_adapter(llama(), "user/repo", **options)
    assert torch.equal(logits(loaded), logits(expected))
    assert not [path for _, path, _ in hub.log if path.endswith("optimizer.pt")]
    if case == "mlx":  # whose name is always the same
        assert torch.equal(
            logits(load_adapter(llama(), "user/repo", local_files_only=True, **options)), logits(expected)
        )


def test_a_file_of_an_unknown_name_is_asked_for_its_header_first(hub, tmp_path):
    """kohya's files are named as their authors like; a whole model may be, too, and is not downloaded."""
    adapted().push_to_hub("user/repo")
    save_file(
        {f"lora_unet_x.{end}": torch.ones(2, 2) for end in ("lora_down.weight", "lora_up.weight")}, tmp_path / "k"
    )
    save_file({"model.diffusion_model.x": torch.ones(2, 2)}, tmp_path / "whole")
    for name, said in (
        ("k", "names no module of this model"),
        ("whole", "the repository on the hub has no adapter_model.safetensors"),
    ):
        hub.put(
            "user/repo", dict.fromkeys((WEIGHTS, CONFIG)) | {"my style.safetensors": (tmp_path / name).read_bytes()}
        )
        hub.log.clear()
        refused(said, "user/repo")
        assert any(method == "HEAD" and "style" in path for method, path, _ in hub.log) is (name == "k")


def test_a_push_that_fails_says_so_and_changes_nothing(hub, monkeypatch):
    model = adapted()
    before = state_digest(model)
    with pytest.raises(CheckpointError, match="was not pushed to 'user/forbidden' .*You have no right to"):
        model.push_to_hub("user/forbidden")
    with pytest.raises(StateError, match="no adapter 'absent'"):
        model.push_to_hub("user/repo", "absent")
    for options, said in (
        ({"max_shard_size": "1KB"}, r"max_shard_size='1KB', and this adapter, which is always one file, has"),
        ({"tags": ["lora"]}, r"push_to_hub: tags=\['lora'\] is not possible; add them"),
        ({"use_auth_token": "hf_x"}, "pass token"),
        ({"safe_serialization": False}, "never as a pickle"),
        ({"commit_massage": "x"}, "no option 'commit_massage' .closest: 'commit_message'"),
    ):
        with pytest.raises(ConfigError, match=said):
            model.push_to_hub("user/repo", **options)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="OfflineModeIsEnabled"):
        model.push_to_hub("user/repo")
    assert not hub.repos
    assert state_digest(model) == before


def test_after_unloading_the_whole_model_is_pushed_as_by_transformers(hub, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    model = adapted().merge_and_unload()
    model.push_to_hub("user/whole")
    assert "config.json" in hub.files("user/whole")


def test_trainer_pushes_the_adapter(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it keeps the address that it met first
    data = [{"input_ids": row, "labels": row} for row in token_ids(8, 10)]
    model = adapted()
    with foreign_code():
        arguments = TrainingArguments(
            tmp_path / "out", max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            push_to_hub=True, hub_model_id="user/trained", hub_strategy="every_save", hub_always_push=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        trainer.push_to_hub()
    branch = hub.files("user/trained")
    assert {WEIGHTS, CONFIG, CARD} <= set(branch)
    assert not [
        name
        for name in branch
        if name.endswith((".safetensors", ".bin")) and name not in (WEIGHTS, "training_args.bin")
    ]
    assert b"library_name: peft" in branch[CARD]
    assert torch.equal(logits(load_adapter(gpt2(), "user/trained")), logits(model.eval()))
