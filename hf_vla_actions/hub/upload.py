"""One commit to a repository of the Hub: all of it becomes visible at once, or nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from hf_vla_actions.errors import HubError
from hf_vla_actions.hub.files import stale_files

LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
ADVICE = {
    400: "the Hub does not take this request",
    401: f"the Hub does not know this token: {LOGIN}",
    402: "the account has no room left for it",
    403: f"this token may not write there: {LOGIN}, and check the owner's name",
    404: f"there is no such repository or revision, or this token may not see it: check the names, {LOGIN}",
    409: "it is there already, or another change is under way: try again",
    412: "somebody else changed the repository in the meantime: nothing was published, run it again",
    413: "it is more than the Hub takes at once",
    429: "too many requests: wait a while, then run it again",
}
OFFLINE = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so the Hub is not asked: unset it"


@dataclass(frozen=True)
class Commit:
    """What was published.

    Args:
        repo_id: owner/name.
        oid: id of the commit.
        url: where to see it.
        pull_request: address of the pull request; None if it is on the branch itself.
        private: whether only the owner can see the repository.
        removed: files of an earlier push that went in the same commit.
        kept: files that were there and are not touched.
    """

    repo_id: str
    oid: str
    url: str
    pull_request: str | None
    private: bool
    removed: tuple[str, ...]
    kept: tuple[str, ...]


class Upload:
    """A repository that files are going to.

    Args:
        repo_id: owner/name; a name alone is one of the token's owner.
        token: of the Hub; that of `hf auth login` or HF_TOKEN if None.
        endpoint: of the Hub; HF_ENDPOINT if None.

    Raises:
        HubError: there is no token, or the Hub does not know it.
    """

    def __init__(self, repo_id: str, *, token: str | None = None, endpoint: str | None = None):
        token = token or get_token()
        if token is None:
            raise HubError(f"there is no token for the Hub: {LOGIN}")
        self.api = HfApi(endpoint=endpoint, token=token)
        self.repo_id = repo_id
        if "/" not in repo_id:
            self.repo_id = f"{self._ask('ask who you are', self.api.whoami)['name']}/{repo_id}"

    def notes_on_base(self, base_model: str, revision: str | None = None) -> list[str]:
        """What to know of the base model of an adapter that is to be published, which others will load it on.

        Args:
            base_model: owner/name.
            revision: of it, where the adapter names one.

        Raises:
            HubError: it is not there, or this token may not see it, or it holds no model.
        """
        what = f"publish an adapter whose base model {base_model} nobody can load, to"
        try:
            info = self._ask(what, self.api.model_info, repo_id=base_model, revision=revision)
        except HubError as error:
            if isinstance(error.__cause__, GatedRepoError):
                return [f"the base model {base_model} is given to those only who ask for it"]
            if error.status in (401, 404):
                raise HubError(
                    f"there is no base model {base_model}{f' at {revision}' if revision else ''} at {self.api.endpoint}, or "
                    "this token may not see it, so that nobody could load the adapter: push the base first, name the one "
                    "that was trained on (base_model=, --base_model), or merge the adapter (hf-vla merge). Nothing was sent",
                    error.status,
                ) from error
            raise
        names = {file.rfilename for file in info.siblings or ()}
        if "config.json" not in names:
            raise HubError(
                f"the repository {base_model} holds no model (no config.json), so that nobody could load the adapter. "
                "Nothing was sent"
            )
        return [f"the base model {base_model} is private: others cannot load the adapter"] if info.private else []

    def send(
        self,
        contents: dict[str, Path | bytes],
        message: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        clean: bool = True,
    ) -> Commit:
        """Upload files, then make them visible in one commit. What was uploaded before is not sent again.

        Args:
            contents: file or bytes of each name in the repository.
            message: first line of the commit.
            private: who can see a repository that is created now; one that is public already raises.
            revision: branch; it is created from the main one if it is missing.
            create_pr: open a pull request instead of changing the branch.
            clean: remove other files of a policy that an earlier push left there.

        Raises:
            HubError: no network, no permission, or somebody else changed the repository meanwhile. Nothing is visible
                then, and another run goes on where this one ended.
        """
        repository: dict[str, Any] = {"repo_id": self.repo_id, "private": private, "exist_ok": True}
        created = self._ask("create the repository", self.api.create_repo, **repository)
        self.repo_id = created.repo_id
        info = self._branch(revision, create_pr)
        if private and not info.private:
            raise HubError(
                f"{self.repo_id} is there already and everybody can see it: make it private in its settings, or push to "
                "another one. Nothing was sent"
            )
        there = [file.rfilename for file in info.siblings or ()]
        removed = stale_files(there, contents) if clean else []
        operations: list[Any] = [CommitOperationAdd(name, _source(content)) for name, content in contents.items()]
        operations += [CommitOperationDelete(name, is_folder=False) for name in removed]
        done = self._ask(
            "publish",
            self.api.create_commit,
            repo_id=self.repo_id,
            operations=operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else info.sha,  # nobody else's change is mixed with this one
        )
        what, published = "look at the commit", done.pr_revision or done.oid
        seen = self._ask(what, self.api.model_info, repo_id=self.repo_id, revision=published)
        names = {file.rfilename for file in seen.siblings or ()}
        lost = sorted(set(contents) - names)
        if lost:
            raise HubError(
                f"{self.repo_id} lacks {lost} after the commit {done.oid}, so that it cannot be used: its .gitignore may "
                "name them; take that away and push again"
            )
        kept = tuple(sorted(names - set(contents)))
        return Commit(self.repo_id, done.oid, done.commit_url, done.pr_url, bool(info.private), tuple(removed), kept)

    def _branch(self, revision: str | None, create_pr: bool) -> Any:
        """What is on the branch; a branch that is missing starts as a copy of the main one."""
        what = "look at the repository"
        try:
            return self._ask(what, self.api.model_info, repo_id=self.repo_id, revision=revision)
        except HubError as error:
            if not isinstance(error.__cause__, RevisionNotFoundError) or create_pr or revision is None:
                raise
        branch = {"repo_id": self.repo_id, "branch": revision, "exist_ok": True}
        self._ask("create a branch in", self.api.create_branch, **branch)
        return self._ask(what, self.api.model_info, repo_id=self.repo_id, revision=revision)

    def _ask(self, what: str, call: Any, **options: Any) -> Any:
        """One call of the client; its errors in one line. `what` says what it is about."""
        try:
            return call(**options)
        except HFValidationError as error:
            raise HubError(f"{self.repo_id!r} is no name of a repository: {_line(error)}") from error
        except OfflineModeIsEnabled as error:
            raise HubError(f"cannot {what}: {OFFLINE}") from error
        except (HfHubHTTPError, HTTPError, OSError, RuntimeError, ValueError) as error:
            raise self._refusal(what, error) from error

    def _refusal(self, what: str, error: BaseException) -> HubError:
        chain = [error]  # an upload in a thread wraps what the network said
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        answered = [cause for cause in chain if isinstance(cause, HfHubHTTPError)]
        head = f"cannot {what} {self.repo_id}: "
        if answered:
            status = answered[0].response.status_code
            default = "the Hub has a problem: try again later" if status >= 500 else "the Hub refuses"
            said = answered[0].server_message
            return HubError(f"{head}{ADVICE.get(status, default)} ({status}{f': {said}' if said else ''})", status)
        if any(isinstance(cause, (HTTPError, OSError)) for cause in chain):
            return HubError(
                f"{head}the connection to {self.api.endpoint} failed ({_line(chain[-1])}). Nothing half is visible; run "
                "it again, files that went up are not sent twice"
            )
        return HubError(head + _line(error))


def _source(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
