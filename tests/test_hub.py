"""What a model's name means, and what is said where the hub does not have it or cannot be asked."""
import errno
import os
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from lowfat.errors import ArgumentError, StorageError
from lowfat.hub import folder_of

RESPONSE = SimpleNamespace(headers={}, status_code=404, request=None)


@pytest.mark.parametrize("error, is_offline, said", [
    (errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"), True,
     ["HF_HUB_OFFLINE is set", "unset it, or give the path of a folder"]),
    (errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2]\nName or service not known"), False,
     ["cannot be reached", "check the network"]),
    (errors.RepositoryNotFoundError("404 Client Error", response=RESPONSE), False, ["no such model", "hf auth login"]),
    (errors.GatedRepoError("403 Client Error", response=RESPONSE), False, ["asks for permission", "model's page"]),
    (errors.HFValidationError("Cannot have -- or .."), False, ["cannot be a name", "spelling"]),
    (ConnectionResetError(104, "Connection reset by peer"), False, ["cannot be reached", "check the network"]),
    (errors.HTTPError("the connection was dropped amid a file"), False, ["cannot be reached", "check the network"]),
    (OSError("Consistency check failed: file should be of size 9\nPlease retry"), False,
     ["Consistency check failed: file should be of size 9"])])
def test_one_line_says_what_was_asked_for_why_not_and_what_to_do(monkeypatch, error, is_offline, said):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: is_offline)
    with pytest.raises(ArgumentError) as raised:
        folder_of("someone/model")
    message = str(raised.value)
    assert message.startswith("someone/model: no such folder, and not to be fetched from the Hugging Face hub: ")
    assert all(part in message for part in said) and "\n" not in message
    assert "Error" not in message and "Errno" not in message  # the cause is kept for a traceback, not for the reader


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_is_not_called_the_network(monkeypatch, code):
    def snapshot_download(*_, **__):
        raise OSError(code, os.strerror(code), "/cache/models--someone--model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(StorageError, match=f"/cache/models--someone--model: {os.strerror(code)}") as raised:
        folder_of("someone/model")
    assert "network" not in str(raised.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "../model", "./model", "a/b/c", ".hidden", "two words", "model/"])
def test_what_cannot_be_a_hub_name_is_a_path(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # not asked
    assert str(folder_of(name)) == name.rstrip("/").removeprefix("./")


def test_a_folder_here_goes_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "model").mkdir(parents=True)
    assert folder_of("someone/model").is_dir()
