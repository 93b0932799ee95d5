"""Many models in PyTorch: a loop, `torch.func.vmap` with and without `torch.compile`, torchmb.

Imported only where PyTorch is there. Adam works element by element, so one optimiser of the stacked
parameters does what one optimiser per member does; `fused=True` is the fastest that PyTorch has.
"""

import contextlib
import copy
import importlib
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.ensemble_models import Peer, Problem, member_params
from benchmarks.models import LEARNING_RATE

# torch.compile forks its compilers, which a process that runs JAX must not; and what it has on disk
# would make its first call look short.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}

# Not an `import`, because type checkers would need PyTorch, which is gigabytes, to read it.
torch: Any = importlib.import_module("torch")
nn: Any = torch.nn
cross_entropy = nn.functional.cross_entropy

__all__ = ["TORCH", "forget_compiled", "settle"]


def settle(threads: int) -> None:
    """Gives PyTorch the threads that JAX has, and like XLA no denormal numbers."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def forget_compiled() -> None:
    """Makes `torch.compile` forget earlier shapes, of which it would make a dynamic one."""
    torch.compiler.reset()


class _Torch:
    """What all share: the batches, channels first, and one module per member."""

    def __init__(self, problem: Problem) -> None:
        x, y = problem.x, problem.y.astype(np.int64)
        if x.ndim == 5:
            x = x.transpose(0, 1, 4, 2, 3)
        self.members = problem.members
        self.batches = [
            (torch.from_numpy(a.copy()), torch.from_numpy(b)) for a, b in zip(x, y, strict=True)
        ]
        self.modules = [_module(problem, member) for member in range(problem.members)]

    def adam(self, params: Any) -> Any:
        return torch.optim.Adam(params, lr=LEARNING_RATE, fused=True)


class Loop(_Torch):
    """One module and one optimiser after another."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizers = [self.adam(module.parameters()) for module in self.modules]

    def forward(self) -> list[Any]:
        x, _ = self.batches[0]
        with torch.inference_mode():
            return [module(x) for module in self.modules]

    def train(self) -> list[Any]:
        return [self._step(x, y) for x, y in self.batches]

    def _step(self, x: Any, y: Any) -> Any:
        losses: list[Any] = []
        for module, optimizer in zip(self.modules, self.optimizers, strict=True):
            optimizer.zero_grad()
            loss = cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)


class Vmap(_Torch):
    """`vmap` over `stack_module_state`, as PyTorch's page on model ensembling has it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        stacked, _ = torch.func.stack_module_state(self.modules)
        self.params = {name: leaf.detach() for name, leaf in stacked.items()}
        self.optimizer = self.adam(self.params.values())
        base = copy.deepcopy(self.modules[0]).to("meta")

        def apply(params: Any, x: Any) -> Any:
            return torch.func.functional_call(base, params, (x,))

        def loss(params: Any, x: Any, y: Any) -> Any:
            return cross_entropy(apply(params, x), y)

        gradient = torch.func.grad_and_value(loss)
        self._apply = self.compiled(torch.vmap(apply, in_dims=(0, None)))
        self._gradient = self.compiled(torch.vmap(gradient, in_dims=(0, None, None)))

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    def forward(self) -> Any:
        with torch.inference_mode():
            return self._apply(self.params, self.batches[0][0])

    def train(self) -> list[Any]:
        losses: list[Any] = []
        for x, y in self.batches:
            grads, loss = self._gradient(self.params, x, y)
            for name, leaf in self.params.items():
                leaf.grad = grads[name]
            self.optimizer.step()
            losses.append(loss)
        return losses


class Compiled(Vmap):
    """The same under `torch.compile`."""

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(fn, dynamic=False)


class TorchMB(_Torch):
    """torchmb's `BatchModule`, which takes a batch per member: here the same one, expanded."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.library = importlib.import_module("torchmb")
        states = [module.state_dict() for module in self.modules]
        # It prints a line for every function that it does not know.
        with contextlib.redirect_stdout(io.StringIO()):
            self.module = self.library.BatchModule(self.modules[0], batch=self.members)
        self.module.load_state_dicts(states)
        self.optimizer = self.adam(self.module.parameters())
        self.batches = [
            (x.expand(self.members, *x.shape), y.expand(self.members, *y.shape))
            for x, y in self.batches
        ]

    def forward(self) -> Any:
        with torch.inference_mode():
            return self.module(self.batches[0][0])

    def train(self) -> list[Any]:
        losses: list[Any] = []
        for x, y in self.batches:
            self.optimizer.zero_grad()
            loss = self.library.batch_loss(self.module(x), y, self.members, cross_entropy)
            loss.sum().backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return losses


def _module(problem: Problem, member: int) -> Any:
    """Returns a module with the parameters of one member."""
    module = _MODULES[problem.model.name]()
    layers = [layer for layer in module.modules() if hasattr(layer, "weight")]
    channels = 0
    for layer, (weights, bias) in zip(layers, member_params(problem, member), strict=True):
        if weights.ndim == 4:
            channels = weights.shape[-1]
            weights = weights.transpose(3, 2, 0, 1)
        elif channels:
            # Behind the last convolution rows are flat: [h, w, c] there, [c, h, w] here.
            image = weights.reshape(-1, channels, weights.shape[-1])
            weights = image.transpose(2, 1, 0).reshape(weights.shape[-1], -1)
            channels = 0
        else:
            weights = weights.T
        layer.load_state_dict(
            {"weight": torch.from_numpy(weights.copy()), "bias": torch.from_numpy(bias.copy())}
        )
    return module


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class _LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.features = nn.Sequential(*first, *second)
        hidden = nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()
        self.classifier = nn.Sequential(*hidden, nn.Linear(84, 10))

    def forward(self, x: Any) -> Any:
        # A method, because torchmb does not know `nn.Flatten`.
        return self.classifier(self.features(x).flatten(1))


_MODULES: dict[str, Callable[[], Any]] = {"MLP": _MLP, "LeNet-5": _LeNet}
TORCH: dict[str, type[Peer]] = {
    "torch loop": Loop,
    "torch vmap": Vmap,
    "torch compiled": Compiled,
    "torchmb": TorchMB,
}
