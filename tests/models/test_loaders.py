"""Models of other libraries by name: they take images in [0, 1], with the normalisation of their weights.

Nothing is downloaded: weights are random, and lie in files. timm and transformers may be missing, and are replaced by
stand-ins that have what the loaders call; the libraries themselves are tested where they are installed.
"""

import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, nn

from guardians.models import load_model
from guardians.models.loaders import LOADERS

IMAGES = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PIXELS = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1))


class Tiny(nn.Module):
    """Logits that know every channel from the others."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def save(network: nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


def raises(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch.hub keeps files; downloads into it fail."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", raises(URLError("no route to host")))
    return tmp_path / "hub"


@pytest.mark.parametrize("prefix", ["timm", "hf", "robustbench"])
def test_a_library_that_is_not_installed(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("timm", "transformers", "robustbench.model_zoo"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"'{prefix}:a': \w+ is not installed: pip install guardians\[{prefix}\]"):
        load_model(f"{prefix}:a")


def test_every_library_is_an_extra() -> None:
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert all(f"\n{prefix} =\n" in setup for prefix in LOADERS if prefix != "torchvision")


class TestTorchvision:
    @pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
    def test_weights_are_the_librarys_or_those_of_a_file(self, name: str, hub: Path, tmp_path: Path) -> None:
        """Pretrained googlenet is another network than a fresh one: it transforms its input."""
        weights = torchvision.models.get_model_weights(name).DEFAULT
        options = {"init_weights": False} if name == "googlenet" else {}
        torch.manual_seed(0)
        network = torchvision.models.get_model(name, weights=None, **options)
        file = save(network, tmp_path / "own.pt")
        given = load_model(f"torchvision:{name}", file)
        assert not hub.exists()

        save(network, hub / "checkpoints" / weights.url.rpartition("/")[2])
        pretrained = torchvision.models.get_model(name, weights=weights).eval()
        expected = pretrained(weights.transforms(crop_size=64, resize_size=64)(IMAGES))
        assert expected.shape == (1, 1000)
        for model in (load_model(f"torchvision:{name}"), given):
            assert not any(module.training for module in model.modules())
            torch.testing.assert_close(model(IMAGES), expected)

    @pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "efficientnet_v2_l"])
    def test_normalisation_is_that_of_the_weights(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def get_model(name: str, weights: Any) -> nn.Module:
            asked.append((name, weights))
            return nn.Identity()

        monkeypatch.setattr(torchvision.models, "get_model", get_model)
        weights = torchvision.models.get_model_weights(name).DEFAULT
        expected = weights.transforms(crop_size=64, resize_size=64)(IMAGES)
        torch.testing.assert_close(load_model(f"torchvision:{name}")(IMAGES), expected)
        assert asked == [(name, weights)]

    def test_no_network(self, hub: Path) -> None:
        with pytest.raises(ValueError, match=r"model='torchvision:squeezenet1_1' cannot be loaded: .*no route to host"):
            load_model("torchvision:squeezenet1_1")

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match=r"'torchvision:resnet51': unknown; close are .*resnet50.*list_models\("):
            load_model("torchvision:resnet51")
        for name in ("", "fasterrcnn_resnet50_fpn", "quantized_resnet18", "no such thing at all"):
            with pytest.raises(ValueError, match=rf"model='torchvision:{name}': unknown.*list_models\("):
                load_model(f"torchvision:{name}")

    def test_weights_that_do_not_fit(self, tmp_path: Path) -> None:
        file = save(Tiny(), tmp_path / "own.pt")
        with pytest.raises(ValueError, match=r"own\.pt' does not fit the model(.|\n)*fc\.weight"):
            load_model("torchvision:squeezenet1_1", file)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_model("torchvision:squeezenet1_1", "nowhere.pt")


class TestTimm:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)

    @pytest.fixture
    def timm(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """What the loader calls of timm; `trained` is the network that it would download."""
        timm: Any = ModuleType("timm")
        timm.trained = Tiny()

        def create_model(name: str, pretrained: bool) -> nn.Module:
            network = Tiny(0 if name == "features" else 4)
            network.pretrained_cfg = {"mean": self.mean, "std": self.std}
            if pretrained and name != "features":
                network.load_state_dict(timm.trained.state_dict())
            return network

        timm.create_model = create_model
        timm.list_models = lambda: ["features", "tiny"]
        timm.is_model = lambda name: name.partition(".")[0] in timm.list_models()
        monkeypatch.setitem(sys.modules, "timm", timm)
        return timm

    def normalised(self, x: Tensor) -> Tensor:
        return (x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    @pytest.mark.parametrize("name", ["tiny", "tiny.some_tag", "hf-hub:org/tiny"])
    def test_pretrained(self, timm: Any, name: str) -> None:
        model = load_model(f"timm:{name}")
        torch.testing.assert_close(model(IMAGES), timm.trained(self.normalised(IMAGES)))

    def test_weights(self, timm: Any, tmp_path: Path) -> None:
        own = Tiny()
        model = load_model("timm:tiny", save(own, tmp_path / "own.pt"))
        torch.testing.assert_close(model(IMAGES), own(self.normalised(IMAGES)))

    def test_no_network(self, timm: Any) -> None:
        timm.create_model = raises(OSError("no route to host"))
        with pytest.raises(ValueError, match=r"model='timm:tiny' cannot be loaded: OSError: no route to host"):
            load_model("timm:tiny")

    def test_unknown(self, timm: Any) -> None:
        with pytest.raises(ValueError, match=r"model='timm:tiney': unknown; close are tiny; timm\.list_models\(\)"):
            load_model("timm:tiney")

    def test_features(self, timm: Any) -> None:
        with pytest.raises(ValueError, match="model='timm:features': has no classifier"):
            load_model("timm:features")

    def test_the_library_itself(self, tmp_path: Path) -> None:
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        network = timm.create_model("test_resnet").eval()
        config = timm.data.resolve_model_data_config(network) | {"input_size": (3, 64, 64), "crop_pct": 1}
        image = torchvision.transforms.functional.to_pil_image(IMAGES[0])
        seen = timm.data.create_transform(**config)(image)[None]
        model = load_model("timm:test_resnet", save(network, tmp_path / "own.pt"))
        images = torchvision.transforms.functional.to_tensor(image)[None]
        torch.testing.assert_close(model(images), network(seen))
        with pytest.raises(ValueError, match=r"model='timm:resnet51': unknown; close are .*resnet50"):
            load_model("timm:resnet51")
        with pytest.raises(ValueError, match=r"model='timm:resnet50\.no_such_tag' cannot be loaded: .*no_such_tag"):
            load_model("timm:resnet50.no_such_tag")


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PROCESSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "ViT": lambda pixels: (pixels / 255 - 0.5) / 0.5,
    "ConvNext": lambda pixels: (pixels / 255 - MEAN) / STD,
    "EfficientNet": lambda pixels: (pixels / 127.5 - 1 - MEAN) / STD / STD,
    "MobileViT": lambda pixels: (pixels / 255).flip(-3),
    "MobileViTv2": lambda pixels: ((pixels / 255 - MEAN) / STD).flip(-3),
    "not rescaled": lambda pixels: pixels - 127.0,
}


class TestHF:
    @pytest.fixture
    def hf(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """What the loader calls of transformers: `trained` is downloaded, `asked` are the sources and options."""
        hf = SimpleNamespace(trained=Tiny(), process=PROCESSORS["ViT"], missing=[], asked=[])

        def processor(images: list[Any], return_tensors: str) -> dict[str, Tensor]:
            """Pads as a crop does that is larger than the image."""
            assert return_tensors == "pt"
            pixels = torch.stack([torchvision.transforms.functional.pil_to_tensor(image) for image in images])
            return {"pixel_values": nn.functional.pad(hf.process(pixels.float()), (9, 9, 9, 9))}

        class WithOutput(Tiny):
            def forward(self, pixel_values: Tensor) -> Any:
                return SimpleNamespace(logits=super().forward(pixel_values))

        class Auto:
            @staticmethod
            def from_pretrained(source: str, **options: Any) -> Any:
                hf.asked.append((source, options))
                return processor

        class AutoModel:
            @staticmethod
            def from_pretrained(source: str, output_loading_info: bool, **options: Any) -> Any:
                hf.asked.append((source, options))
                network = WithOutput()
                network.load_state_dict(hf.trained.state_dict())
                return network.half(), {"missing_keys": hf.missing}

            @staticmethod
            def from_config(config: Any) -> nn.Module:
                return WithOutput()

        hf.module = ModuleType("transformers")
        hf.module.AutoImageProcessor = hf.module.AutoConfig = Auto
        hf.module.AutoModelForImageClassification = AutoModel
        monkeypatch.setitem(sys.modules, "transformers", hf.module)
        return hf

    @pytest.mark.parametrize("kind", PROCESSORS)
    def test_normalisation_is_that_of_the_image_processor(self, hf: Any, kind: str, tmp_path: Path) -> None:
        hf.process = PROCESSORS[kind]
        own = Tiny()
        model = load_model("hf:org/name", save(own, tmp_path / "own.pt"))
        torch.testing.assert_close(model(PIXELS / 255), own(hf.process(PIXELS.float())))
        assert all(options["local_files_only"] for _, options in hf.asked)

    def test_pretrained_is_single_precision(self, hf: Any) -> None:
        model = load_model("hf:org/name")
        expected = hf.trained.half().float()(hf.process(PIXELS.float()))
        torch.testing.assert_close(model(PIXELS / 255), expected)
        assert [source for source, _ in hf.asked] == ["org/name"] * 2
        assert not any(options["local_files_only"] or options["trust_remote_code"] for _, options in hf.asked)

    def test_folder(self, hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/of/a/user")
        load_model("hf:~/saved")
        assert {source for source, _ in hf.asked} == {"/of/a/user/saved"}

    def test_a_classifier_that_the_weights_lack(self, hf: Any) -> None:
        hf.missing = ["fc.weight", "fc.bias"]
        with pytest.raises(ValueError, match=r"'hf:org/name' cannot be loaded: .* weights lack fc\.bias, fc\.weight"):
            load_model("hf:org/name")

    @pytest.mark.parametrize(
        "process",
        [
            lambda pixels: pixels.mean(1, keepdim=True).expand_as(pixels),
            lambda pixels: pixels[:, [1, 0, 2]],
            torch.zeros_like,
        ],
        ids=["grey", "GRB", "black"],
    )
    def test_an_image_processor_that_does_something_else(self, hf: Any, process: Callable[[Tensor], Tensor]) -> None:
        hf.process = process
        with pytest.raises(ValueError, match=r"model='hf:org/name' cannot be loaded: .* does more to a channel"):
            load_model("hf:org/name")

    def test_no_network(self, hf: Any) -> None:
        hf.module.AutoImageProcessor = SimpleNamespace(from_pretrained=raises(OSError("no route to host")))
        with pytest.raises(ValueError, match=r"model='hf:org/name' cannot be loaded: OSError: no route to host"):
            load_model("hf:org/name")

    @pytest.mark.parametrize("kind", ["ViT", "EfficientNet", "MobileViT"])
    def test_the_library_itself(self, kind: str, tmp_path: Path) -> None:
        """A tiny network of each kind of image processor, saved and loaded."""
        transformers = pytest.importorskip("transformers")
        size = {"image_size": 32, "num_labels": 4}
        if kind == "ViT":
            hidden = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
            config = transformers.ViTConfig(patch_size=8, **hidden, **size)
        elif kind == "EfficientNet":
            config = transformers.EfficientNetConfig(
                width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=16, **size
            )
        else:
            widths = {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8]}
            config = transformers.MobileViTConfig(**widths, num_attention_heads=2, **size)
        torch.manual_seed(0)
        network = transformers.AutoModelForImageClassification.from_config(config).eval()
        processor = getattr(transformers, f"{kind}ImageProcessor")()
        network.save_pretrained(tmp_path / "saved")
        processor.save_pretrained(tmp_path / "saved")

        seen = processor(list(PIXELS.byte()), do_resize=False, do_center_crop=False, return_tensors="pt")
        expected = network(seen["pixel_values"]).logits
        torch.testing.assert_close(load_model(f"hf:{tmp_path / 'saved'}")(PIXELS / 255), expected)
        with torch.no_grad():
            next(network.parameters()).mul_(2)
        own = save(network, tmp_path / "own.pt")
        other = load_model(f"hf:{tmp_path / 'saved'}", own)(PIXELS / 255)
        torch.testing.assert_close(other, network(seen["pixel_values"]).logits)

    def test_what_the_library_itself_does_not_find(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(ValueError, match=r"model='hf:/no/such/folder' cannot be loaded"):
            load_model("hf:/no/such/folder")
        with pytest.raises(ValueError, match=r"model='hf:' cannot be loaded"):
            load_model("hf:")


class TestRobustBench:
    @pytest.fixture(params=["installed", "stand-in"])
    def utils(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Its module that loads, with tiny models in two places; torchattacks brings a RobustBench of its own."""
        if request.param == "installed":
            utils: Any = pytest.importorskip("robustbench.utils")
            registry = utils.all_models
        else:
            dataset, threat_models = Enum("Dataset", {"A": "cifar10"}), Enum("ThreatModel", {"A": "Linf", "B": "L2"})
            registry = {dataset.A: {threat_models.A: {}, threat_models.B: {}}}

            def load(name: str, model_dir: Path, dataset: str, threat_model: str) -> nn.Module:
                network = Tiny()
                path = Path(model_dir) / dataset / threat_model / f"{name}.pt"
                network.load_state_dict(torch.load(path, weights_only=True))
                return network

            utils, zoo = ModuleType("robustbench.utils"), ModuleType("robustbench.model_zoo")
            utils.load_model, zoo.model_dicts = load, registry
            monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
            monkeypatch.setitem(sys.modules, "robustbench.model_zoo", zoo)
        cifar10 = next(iter(registry.values()))
        linf, l2 = ({key.value: entries for key, entries in cifar10.items()}[value] for value in ("Linf", "L2"))
        entry = {"model": Tiny, "gdrive_id": "none"}
        for place, name in ((linf, "Tiny2026Test"), (l2, "Tiny2026Test"), (l2, "Tiny2026Other")):
            monkeypatch.setitem(place, name, entry)
        return utils

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("Tiny2026Test", "cifar10/Linf/Tiny2026Test"),
            ("cifar10/L2/Tiny2026Test", "cifar10/L2/Tiny2026Test"),
            ("Tiny2026Other", "cifar10/L2/Tiny2026Other"),
        ],
    )
    def test_pretrained(self, utils: Any, hub: Path, name: str, place: str) -> None:
        trained = Tiny()
        save(trained, hub / "robustbench" / f"{place}.pt")
        torch.testing.assert_close(load_model(f"robustbench:{name}")(IMAGES), trained(IMAGES))

    def test_weights(self, utils: Any, hub: Path, tmp_path: Path) -> None:
        own = Tiny()
        model = load_model("robustbench:Tiny2026Test", save(own, tmp_path / "own.pt"))
        torch.testing.assert_close(model(IMAGES), own(IMAGES))
        assert not hub.exists()

    def test_no_network(self, utils: Any, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(utils, "load_model", raises(OSError("no route to host")))
        with pytest.raises(ValueError, match=r"model='robustbench:Tiny2026Test' cannot be loaded: .*no route to host"):
            load_model("robustbench:Tiny2026Test")

    @pytest.mark.parametrize("name", ["Tiny2026Tests", "cifar10/Linf/Tiny2026Tes"])
    def test_unknown(self, utils: Any, name: str) -> None:
        with pytest.raises(ValueError, match=rf":{name}': unknown; close are .*Tiny2026Test\b.*model_dicts"):
            load_model(f"robustbench:{name}")
        for wrong in ("", "Linf", "cifar10/Linf/"):
            with pytest.raises(ValueError, match=f"'robustbench:{wrong}': unknown"):
                load_model(f"robustbench:{wrong}")

    def test_the_library_itself(self) -> None:
        pytest.importorskip("robustbench.model_zoo")
        network, model = LOADERS["robustbench"]("robustbench:Wong2020Fast", False)
        assert model is network
        assert type(model).__name__ == "Wong2020FastNet"
