"""Models by name: what is saved comes back, and what cannot be loaded is named."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from guardians.models import ARCHITECTURES, build_model, bundled_models, load_model, model_card, registry, save_model

CARD = {"name": "resnet9-4-test", "architecture": {"name": "resnet9", "width": 4}, "test_accuracy": 0.5}

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

OWN_MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 3))

def needs_an_argument(width):
    return build()

def not_a_model():
    return "a string"

number = 3
"""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the bundled weights."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(registry, "_WEIGHTS", folder)
    return folder


@pytest.fixture
def saved(weights: Path) -> nn.Module:
    """A model saved under the name of `CARD`, with batch norm statistics of its own."""
    torch.manual_seed(0)
    model = build_model("resnet9", width=4)
    model.train()(IMAGES)
    save_model(model, CARD, weights)
    return model.eval()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a user's module `own_models_of_a_user`, and a path without it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "own_models_of_a_user.py").write_text(OWN_MODULE)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.chdir(folder)
    for name in ("own_models_of_a_user", "own_broken_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


class TestBundled:
    def test_round_trip(self, saved: nn.Module) -> None:
        model = load_model("resnet9-4-test")
        assert model is not saved
        assert torch.equal(model(IMAGES), saved(IMAGES))

    def test_evaluation_mode_and_device(self, saved: nn.Module) -> None:
        model = load_model("resnet9-4-test", device="cpu")
        assert not any(module.training for module in model.modules())
        meta = load_model("resnet9-4-test", device=torch.device("meta"))
        assert {tensor.device.type for tensor in meta.state_dict().values()} == {"meta"}

    def test_files(self, saved: nn.Module, weights: Path) -> None:
        assert sorted(file.name for file in weights.iterdir()) == ["resnet9-4-test.json", "resnet9-4-test.safetensors"]
        stored = load_file(weights / "resnet9-4-test.safetensors")
        assert stored.keys() == saved.state_dict().keys()
        assert all(torch.equal(stored[key], value) for key, value in saved.state_dict().items())

    def test_save_returns_the_path_and_makes_the_folder(self, tmp_path: Path) -> None:
        path = save_model(build_model("resnet9", width=1), CARD, tmp_path / "a" / "b")
        assert path == tmp_path / "a" / "b" / "resnet9-4-test.safetensors"
        assert path.is_file()

    def test_channels_last_weights_are_saved(self, saved: nn.Module, weights: Path) -> None:
        save_model(saved.to(memory_format=torch.channels_last), CARD | {"name": "other"}, weights)
        torch.testing.assert_close(load_model("other")(IMAGES), load_model("resnet9-4-test")(IMAGES))

    def test_names_with_dots(self, saved: nn.Module, weights: Path) -> None:
        save_model(saved, CARD | {"name": "resnet9-4-eps0.5"}, weights)
        assert bundled_models() == ["resnet9-4-eps0.5", "resnet9-4-test"]
        assert torch.equal(load_model("resnet9-4-eps0.5")(IMAGES), saved(IMAGES))

    def test_card(self, saved: nn.Module, weights: Path) -> None:
        assert model_card("resnet9-4-test") == CARD
        assert json.loads((weights / "resnet9-4-test.json").read_text()) == CARD

    def test_loading_leaves_the_random_stream_of_the_caller_usable(self, saved: nn.Module) -> None:
        """The weights come from the file, whatever the seed."""
        torch.manual_seed(1)
        first = load_model("resnet9-4-test")(IMAGES)
        torch.manual_seed(2)
        assert torch.equal(load_model("resnet9-4-test")(IMAGES), first)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_other_weights_replace_the_bundled_ones(self, saved: nn.Module, tmp_path: Path, suffix: str) -> None:
        torch.manual_seed(5)
        other = build_model("resnet9", width=4).eval()
        file = store(other, tmp_path / f"other{suffix}")
        for path in (file, str(file)):
            assert torch.equal(load_model("resnet9-4-test", path)(IMAGES), other(IMAGES))

    def test_weights_below_the_home_directory(
        self, saved: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store(saved, tmp_path / "w.pt")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert torch.equal(load_model("resnet9-4-test", "~/w.pt")(IMAGES), saved(IMAGES))

    def test_unknown_model_lists_the_known_ones(self, saved: nn.Module) -> None:
        for function in (load_model, model_card):
            with pytest.raises(ValueError, match=r"model='resnet10'.*resnet9-4-test.*package\.module:callable"):
                function("resnet10")

    def test_unknown_model_where_none_is_bundled(self, weights: Path) -> None:
        assert bundled_models() == []
        with pytest.raises(ValueError, match="model='resnet9-4-test': unknown; bundled are none"):
            load_model("resnet9-4-test")

    def test_path_is_not_a_name(self, saved: nn.Module, weights: Path) -> None:
        with pytest.raises(ValueError, match="unknown"):
            load_model(str(weights / "resnet9-4-test"))

    def test_weights_missing(self, saved: nn.Module, weights: Path) -> None:
        (weights / "resnet9-4-test.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"resnet9-4-test\.safetensors' does not exist"):
            load_model("resnet9-4-test")
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pt' does not exist"):
            load_model("resnet9-4-test", "nowhere.pt")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_weights_that_do_not_fit(self, saved: nn.Module, tmp_path: Path, suffix: str) -> None:
        wide = store(build_model("resnet9", width=5), tmp_path / f"wide{suffix}")
        with pytest.raises(
            ValueError, match=rf"wide{suffix}' does not fit the model(.|\n)*size mismatch for 1\.0\.weight"
        ):
            load_model("resnet9-4-test", wide)
        other = store(nn.Linear(2, 2), tmp_path / f"linear{suffix}")
        with pytest.raises(ValueError, match=r'Missing key\(s\).*"12\.weight"(.|\n)*Unexpected key\(s\).*"bias"'):
            load_model("resnet9-4-test", other)

    @pytest.mark.parametrize("content", [[1, 2], 3, {"12.weight": 3}, {1: torch.zeros(1)}, torch.zeros(3)])
    def test_file_without_a_state_dict(self, saved: nn.Module, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other\.pt' does not fit the model"):
            load_model("resnet9-4-test", tmp_path / "other.pt")

    @pytest.mark.parametrize("content", [b"", b"no weights", b"\x10\0\0\0\0\0\0\0{}", b"PK\x03\x04 half an archive"])
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_corrupt_weights(self, saved: nn.Module, tmp_path: Path, suffix: str, content: bytes) -> None:
        file = tmp_path / f"corrupt{suffix}"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"corrupt{suffix}' cannot be read"):
            load_model("resnet9-4-test", file)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_truncated_weights(self, saved: nn.Module, tmp_path: Path, suffix: str) -> None:
        file = store(saved, tmp_path / f"cut{suffix}")
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(ValueError, match=rf"cut{suffix}' cannot be read"):
            load_model("resnet9-4-test", file)

    @pytest.mark.parametrize("write", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x, protocol=2))])
    def test_pickle_with_code_is_refused(
        self, saved: nn.Module, tmp_path: Path, write: Callable[[object, Path], object]
    ) -> None:
        trap = tmp_path / "trap"
        write({"12.weight": RunsOnLoading(trap)}, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match=r"evil\.pt' cannot be read"):
            load_model("resnet9-4-test", tmp_path / "evil.pt")
        assert not trap.exists()

    @pytest.mark.parametrize(
        "name", ["../outside", "a/b", "a\\b", "a:b", "", 3, "..", ".hidden", "a\0b", "a\nb", "a" * 201]
    )
    def test_name_that_is_no_file_name(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"card\['name'\]="):
            save_model(nn.Linear(1, 1), CARD | {"name": name}, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("key", ["name", "architecture"])
    def test_card_without_what_loading_needs(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(ValueError, match=f"lacks {key}"):
            save_model(nn.Linear(1, 1), {k: v for k, v in CARD.items() if k != key}, tmp_path)

    def test_card_that_is_not_json(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="JSON"):
            save_model(nn.Linear(1, 1), CARD | {"recipe": object()}, tmp_path)
        assert list(tmp_path.iterdir()) == []


class RunsOnLoading:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def store(model: nn.Module, file: Path) -> Path:
    """The state dict in the format of the file's suffix."""
    if file.suffix == ".pt":
        torch.save(model.state_dict(), file)
        return file
    return save_model(model, CARD | {"name": file.stem}, file.parent)


class TestBuild:
    def test_arguments(self) -> None:
        model = build_model("wide_resnet", depth=10, widen_factor=1, num_classes=3)
        assert model.eval()(IMAGES).shape == (2, 3)

    def test_unknown_architecture_lists_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=f"architecture='vgg'.*{'.*'.join(ARCHITECTURES)}"):
            build_model("vgg")

    @pytest.mark.parametrize(
        ("architecture", "arguments", "named"),
        [
            ("resnet9", {"depth": 3}, "depth"),
            ("resnet18", {"width": 3}, "width"),
            ("resnet9", {"width": "3"}, "width='3'"),
        ],
    )
    def test_wrong_arguments(self, architecture: str, arguments: dict[str, int], named: str) -> None:
        with pytest.raises(ValueError, match=f"architecture='{architecture}' does not take .*{named}"):
            build_model(architecture, **arguments)

    def test_wrong_values(self) -> None:
        with pytest.raises(ValueError, match="width=0"):
            build_model("resnet9", width=0)
        with pytest.raises(ValueError, match="depth=12"):
            build_model("wide_resnet", depth=12)


class TestOwnModel:
    NAME = "own_models_of_a_user:build"
    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))

    def expected(self, weight: Tensor, bias: Tensor) -> Tensor:
        return self.x.flatten(1) @ weight.T + bias

    def test_module_in_the_working_directory(self, own: Path) -> None:
        model = load_model(self.NAME)
        assert not any(module.training for module in model.modules())
        torch.testing.assert_close(model(self.x), self.expected(model[2].weight, model[2].bias))

    def test_module_on_the_path(self, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = own / "elsewhere" / "a_users_package"
        package.mkdir(parents=True)
        (own / "own_models_of_a_user.py").rename(package / "nets.py")
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(str(package.parent))
        assert load_model("a_users_package.nets:build")(self.x).shape == (4, 3)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_weights(self, own: Path, suffix: str) -> None:
        torch.manual_seed(9)
        trained = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 3))
        file = store(trained, own / f"trained{suffix}")
        model = load_model(self.NAME, file.name)
        torch.testing.assert_close(model(self.x), self.expected(trained[2].weight, trained[2].bias))
        assert not torch.equal(load_model(self.NAME)(self.x), model(self.x))

    def test_working_directory_is_on_the_path_only_while_loading(self, own: Path) -> None:
        (own / "own_part_of_a_user.py").write_text("from own_models_of_a_user import build\n")
        (own / "own_models_of_a_user.py").write_text(
            OWN_MODULE + "\ndef late():\n    import own_part_of_a_user\n    return own_part_of_a_user.build()\n"
        )
        before = list(sys.path)
        assert isinstance(load_model("own_models_of_a_user:late"), nn.Module)
        assert sys.path == before
        with pytest.raises(ValueError, match="call without arguments failed"):
            load_model("own_models_of_a_user:needs_an_argument")
        with pytest.raises(ValueError, match="cannot be imported"):
            load_model("no_such_module_anywhere:build")
        assert sys.path == before

    def test_what_is_on_the_path_stays_there(self, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (own / "own_models_of_a_user.py").write_text(OWN_MODULE + "\nimport sys\nsys.path.insert(0, 'theirs')\n")
        before = list(sys.path)
        load_model(self.NAME)
        assert sys.path == ["theirs", *before]
        monkeypatch.setattr(sys, "path", [str(own), *before])
        load_model(self.NAME)
        assert sys.path == [str(own), *before]

    def test_class(self, own: Path) -> None:
        assert isinstance(load_model("torch.nn:Identity"), nn.Identity)

    def test_device(self, own: Path) -> None:
        assert load_model(self.NAME, device="meta")[2].weight.device.type == "meta"

    def test_weights_missing(self, own: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"'nowhere\.pt' does not exist"):
            load_model(self.NAME, "nowhere.pt")

    def test_weights_that_do_not_fit(self, own: Path) -> None:
        store(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 4)), own / "four.pt")
        with pytest.raises(ValueError, match=r"four\.pt' does not fit the model(.|\n)*2\.weight"):
            load_model(self.NAME, "four.pt")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("no_such_module_anywhere:build", "No module named 'no_such_module_anywhere'"),
            ("own_models_of_a_user:nothing", "'nothing' cannot be imported"),
            ("own_models_of_a_user:", "'nothing' cannot be imported"),
            (":build", "'build' cannot be imported"),
            (".relative:build", "'build' cannot be imported"),
            ("own_models_of_a_user:number", "not a callable but int"),
            ("own_models_of_a_user:not_a_model", r"returned str, not a torch\.nn\.Module"),
            ("own_models_of_a_user:needs_an_argument", "call without arguments failed.*'width'"),
            ("own_models_of_a_user:a:b", "'a:b' cannot be imported"),
        ],
    )
    def test_bad_names(self, own: Path, name: str, reason: str) -> None:
        with pytest.raises(ValueError, match=f"model='{name}': .*{reason}"):
            load_model(name)

    @pytest.mark.parametrize(
        ("code", "error"),
        [("def broken(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("raise OSError", "OSError")],
    )
    def test_module_that_fails(self, own: Path, code: str, error: str) -> None:
        (own / "own_broken_models.py").write_text(code)
        with pytest.raises(ValueError, match=f"model='own_broken_models:build'.*{error}") as caught:
            load_model("own_broken_models:build")
        assert type(caught.value.__cause__).__name__ == error
