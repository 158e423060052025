"""Files of the published models: fetched from Hugging Face, found again without a network.

Files go to Hugging Face's cache (HF_HOME says where), or to a folder of the user's choice. Downloads resume.
How the LinearDiT's files are called inside its repository is found out by listing it.
"""

from __future__ import annotations

import errno
import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kairos.errors import KairosError, MachineError, UserError, one_line

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Source:
    """What to take of a repository: the files that fit `patterns`; without patterns, its LinearDiT."""

    repo: str
    patterns: tuple[str, ...] = ()


def fetch(source: Source, folder: Path | None = None) -> Path:
    """Download what is not here yet, into the cache or into `folder`; returns where the files lie.

    Raises:
        UserError: where the repository is not there, or not for this user.
        MachineError: where the network or the disk fails, and where files are still missing.
    """
    import huggingface_hub

    with _explained(source.repo):
        patterns: Sequence[str] = source.patterns
        if not patterns:
            listed = huggingface_hub.HfApi().model_info(source.repo).siblings or []
            names = [file.rfilename for file in listed]
            patterns = [glob.escape(name) for name in transformer_files(names)]
            if not patterns:
                shown = ", ".join(names[:6]) or "nothing"
                raise UserError(
                    f"{source.repo} has no weights at its top level or in transformer/; it has {shown}"
                )
        found = huggingface_hub.snapshot_download(
            source.repo, allow_patterns=list(patterns), local_dir=folder
        )
    # Where it cannot reach the network, the hub takes a folder as it is.
    if find(source, Path(found)) is None:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError(_forbidden(source.repo))
        raise MachineError(_unreachable(source.repo, huggingface_hub.constants.ENDPOINT))
    return weights_folder(source, Path(found))


def find(source: Source, folder: Path | None = None) -> Path | None:
    """Where the files of `source` lie, complete, in the cache or in `folder`; None where they do not."""
    if folder is None:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            # A pattern that fits nothing: the hub would miss the files that nobody wanted.
            patterns = list(source.patterns) or ["-"]
            folder = Path(
                huggingface_hub.snapshot_download(source.repo, allow_patterns=patterns, local_files_only=True)
            )
        except LocalEntryNotFoundError:
            return None
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    wanted = source.patterns or [glob.escape(name) for name in transformer_files(names)]
    files = [[file for file in folder.glob(pattern) if file.exists()] for pattern in wanted]
    complete = files and all(files) and _shards_are_there(file for fitting in files for file in fitting)
    return weights_folder(source, folder) if complete else None


def transformer_files(names: Sequence[str]) -> list[str]:
    """The LinearDiT's files among a repository's: weights at the top level, else those in transformer/.

    Safetensors go before torch's files; indexes of shards and config.json come along.
    """
    for folder in ("", "transformer/"):
        here = [name for name in names if name.startswith(folder) and "/" not in name.removeprefix(folder)]
        for endings in (WEIGHTS[:1], WEIGHTS[1:]):
            if weights := [name for name in here if name.endswith(endings)]:
                beside = (".index.json", "/config.json") if folder else (".index.json",)
                return sorted(weights + [name for name in here if name.endswith(beside)])
    return []


def weights_folder(source: Source, folder: Path) -> Path:
    """Where in a downloaded folder the files lie: the LinearDiT's may be in transformer/."""
    if source.patterns or any(file.suffix in WEIGHTS for file in folder.iterdir()):
        return folder
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def _shards_are_there(files: Iterable[Path]) -> bool:
    """All that the indexes of shards among the files name are there."""
    for index in files:
        if not index.name.endswith(".index.json"):
            continue
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            if not all((index.parent / name).exists() for name in names):
                return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
    return True


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What goes wrong with a download, in one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except KairosError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no repository {repo} at {constants.ENDPOINT}, or it is private; log in with `hf auth login`"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(_forbidden(repo)) from error
    except errors.HfHubHTTPError as error:
        raise MachineError(f"downloading {repo} failed: {one_line(error)}; run the command again") from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise UserError(_forbidden(repo)) from error
        raise MachineError(_unreachable(repo, constants.ENDPOINT)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise MachineError(
                f"the disk is full before {repo} is whole; free some space (or set HF_HOME to another disk) "
                "and run the command again: it goes on where it stopped"
            ) from error
        raise MachineError(f"downloading {repo} failed: {one_line(error)}") from error
    except Exception as error:
        # The hub's HTTP library, whichever it is in this version, has errors of its own.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise MachineError(_unreachable(repo, constants.ENDPOINT)) from error


def _forbidden(repo: str) -> str:
    return f"HF_HUB_OFFLINE forbids downloading {repo}; unset it"


def _unreachable(repo: str, endpoint: str) -> str:
    return f"cannot reach {endpoint} to download {repo}; check the network, or set HF_ENDPOINT to a mirror"
