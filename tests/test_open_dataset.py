"""One call for every format, and datasets of the Hub, served here by an endpoint on this machine."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from test_lerobot import picture, refusal, write_set
from test_lerobot_v2 import write_v2

from hf_vla_actions.data import ChunkDataset, LeRobotDataset, LeRobotV2Dataset, open_dataset
from hf_vla_actions.data.rlds import RLDSDataset

COMMITS = {"main": "1" * 40, "old": "2" * 40}


class Hub(http.server.ThreadingHTTPServer):
    """The few addresses of the Hub's API that downloads use, for the repositories in `folder`."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "datasets"]:
            repo, what, revision = "/".join(path[2:4]), path[4], path[5]
            root, commit = self.found(repo, revision)
            if root is None:
                return
            files = sorted(file for file in root.rglob("*") if file.is_file())
            names = [file.relative_to(root).as_posix() for file in files]
            if what == "revision":
                answer = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            else:
                answer = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                    for name, file in zip(names, files, strict=True)
                ]
            self.reply(200, json.dumps(answer).encode(), body, {"Content-Type": "application/json"})
            return
        repo, revision, name = "/".join(path[1:3]), path[4], "/".join(path[5:])
        root, commit = self.found(repo, revision)
        if root is None:
            return
        if not (root / name).is_file():
            self.reply(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        if body:
            self.server.fetched.append(name)
        headers = {"ETag": f'"{digest(root / name)}"', "X-Repo-Commit": commit}
        self.reply(200, (root / name).read_bytes(), body, headers)

    def found(self, repo, revision):
        root = self.server.folder / repo
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if not root.is_dir():
            self.reply(401, b"", True, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif commit is None:
            self.reply(404, b"", True, {"X-Error-Code": "RevisionNotFound"})
        else:
            return root, commit
        return None, None

    def reply(self, status, content, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def digest(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def videos(hub):
    return [name for name in hub.fetched if name.endswith(".mp4")]


# formats


def test_the_format_is_found_out_from_the_folder(shared, tmp_path):
    rlds = shared / "data/bridge_rlds"
    for path, kind in (
        (shared / "data/bridge_sample", LeRobotDataset),
        (shared / "data/groot_demo_v2/demo_data/robot_sim.PickNPlace", LeRobotV2Dataset),
        (next(rlds.rglob("dataset_info.json")).parent, RLDSDataset),
        (write_set(tmp_path / "v3"), LeRobotDataset),
        (write_v2(tmp_path / "v2", version="v2.0"), LeRobotV2Dataset),
    ):
        dataset = open_dataset(str(path))
        assert type(dataset) is kind
        assert dataset.actions.shape == (len(dataset), dataset.dof)
        assert ChunkDataset(dataset, 2)[1]["actions"].shape == (2, dataset.dof)


def test_options_reach_the_reader(tmp_path):
    root = write_v2(tmp_path / "set")
    dataset = open_dataset(root, cameras=["front"], action_key="observation.state", state_key=None)
    assert (dataset.cameras, dataset.dof, dataset.states) == (("front",), 1, None)


def test_what_is_no_dataset_raises(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/episode_0.hdf5").write_text("")
    refusal(lambda: open_dataset(tmp_path / "a"), "no meta/info.json", "no dataset_info.json", "['episode_0.hdf5']")
    refusal(lambda: open_dataset(tmp_path / "b"), tmp_path / "b", "does not exist")
    refusal(lambda: open_dataset(str(tmp_path / "b")), tmp_path / "b", "does not exist")
    refusal(lambda: open_dataset(tmp_path / "a", revision="main"), "revision='main' is for a repository")


@pytest.mark.parametrize("version", ["v1.6", "v4.0", "v30", "v2.2", "2"])
def test_other_versions_raise(tmp_path, version):
    refusal(lambda: open_dataset(write_v2(tmp_path / "set", version=version)), f"LeRobotDataset {version}", "v2.1")


# the Hub


@pytest.mark.parametrize("write", [write_v2, lambda path: write_set(path, cameras=("front",), video=True)])
def test_a_repository_gives_what_its_folder_gives_and_videos_come_when_asked_for(hub, write):
    local = open_dataset(write(hub.folder / "me/arm"))
    dataset = open_dataset("me/arm")
    assert type(dataset) is type(local)
    assert dataset.name == "arm"
    assert dataset.cameras == local.cameras
    assert dataset.actions.tolist() == local.actions.tolist()
    assert dataset.episodes == local.episodes
    assert videos(hub) == []
    assert np.array_equal(dataset.frame(3, "front"), local.frame(3, "front"))
    assert len(videos(hub)) == 1
    dataset.frame(0, "front")
    again = open_dataset("me/arm")
    assert np.array_equal(again.frame(10, "front"), local.frame(10, "front"))
    assert len(videos(hub)) == (2 if write is write_v2 else 1)
    assert len(set(hub.fetched)) == len(hub.fetched)  # nothing twice


def test_pictures_inside_the_data_files_come_with_them(hub):
    write_set(hub.folder / "me/arm", cameras=("front",))
    dataset = open_dataset("me/arm")
    assert np.array_equal(dataset.frame(7, "front"), picture(7))


def test_rlds_repositories_are_read_too(hub, shared):
    source = next((shared / "data/bridge_rlds").rglob("dataset_info.json")).parent
    (hub.folder / "me").mkdir(parents=True)
    (hub.folder / "me/bridge").symlink_to(source)
    dataset, local = open_dataset("me/bridge"), open_dataset(source)
    assert type(dataset) is RLDSDataset
    assert np.array_equal(dataset.actions, local.actions)


def test_a_revision_is_fetched_and_kept_to(hub):
    write_v2(hub.folder / "me/arm")
    dataset = open_dataset("me/arm", revision="old")
    assert dataset.files.commit == COMMITS["old"]
    dataset.frame(0, "front")
    assert [path.parent.name for path in Path("cache").rglob("videos")] == [COMMITS["old"]]


def test_without_a_connection_what_was_fetched_is_read_and_the_rest_raises(hub, monkeypatch):
    write_v2(hub.folder / "me/arm")
    online = open_dataset("me/arm")
    first = np.asarray(online.frame(0, "front"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    dataset = open_dataset("me/arm")
    assert dataset.cameras == online.cameras
    assert np.array_equal(dataset.frame(0, "front"), first)
    refusal(lambda: dataset.frame(10, "front"), "episode_000002.mp4", "me/arm", "cannot be fetched")
    refusal(
        lambda: open_dataset("me/other"), "no folder 'me/other'", "no dataset repository", "LocalEntryNotFoundError"
    )


def test_a_repository_that_is_not_there_raises(hub):
    write_v2(hub.folder / "me/arm")
    refusal(lambda: open_dataset("me/leg"), "no folder 'me/leg'", "no dataset repository", "RepositoryNotFoundError")
    refusal(lambda: open_dataset("me/arm", revision="new"), "at revision 'new'", "RevisionNotFoundError")
    (hub.folder / "me/text").mkdir()
    (hub.folder / "me/text/README.md").write_text("hello")
    refusal(lambda: open_dataset("me/text"), "me/text holds neither a LeRobotDataset", "['README.md']")


def test_a_hub_that_is_gone_raises(hub, monkeypatch):
    write_v2(hub.folder / "me/arm")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
    dataset = open_dataset("me/arm")
    hub.shutdown()
    hub.server_close()
    refusal(lambda: dataset.frame(0, "front"), "cannot be fetched")
    refusal(lambda: open_dataset("me/leg"), "no dataset repository")


def test_a_video_that_the_repository_lacks_raises(hub):
    root = write_v2(hub.folder / "me/arm")
    (root / "videos/chunk-000/front/episode_000001.mp4").unlink()
    dataset = open_dataset("me/arm")
    refusal(lambda: dataset.frame(4, "front"), "episode_000001.mp4 is missing")
