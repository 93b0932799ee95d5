"""The plan store: a private folder of compiled plans, so that a restart does not compile."""

import hashlib
import itertools
import os
import platform
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxhandler.errors import explain, warn
from jaxhandler.files import atomic_write, private
from jaxhandler.plans import compile_lowered, compile_plan, signature
from jaxhandler.versions import processor, versions

__all__ = ["compile_fn", "enable_plan_store"]

_CALLS_BEFORE_LOADING = 32
_DIGEST = 32
_SETTINGS = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class _Process:
    """What is process-wide: the folder in use, and JAX's settings before it was."""

    folder: Path | None = None
    former: dict[str, Any] | None = None
    lock = threading.Lock()


def enable_plan_store(directory: str | os.PathLike[str] | None) -> Path | None:
    """Keeps compiled plans in a folder of this machine, so that a restart does not compile them.

    It holds for the whole process and all that JAX compiles from now on: JAX's persistent
    compilation cache is turned on, with thresholds that small models pass. Loaded inferers
    (`jh.load_inferer`) also store their plans' executables: in a process that starts again these
    serve the first requests within milliseconds, nothing traced or lowered; after some calls the
    plan itself, which has less overhead per call, is loaded from the cache in a thread.

    Plans are kept apart by processor, device, versions and settings: elsewhere they are compiled
    again, never misused. Executables are code: whoever can write to the folder can run what they
    like as you. So it is made for its owner alone, and one that others can write to is refused;
    keep it out of artifacts that you pass on. It may be deleted at any time.

    Args:
        directory: The folder; made where there is none. None turns the store off again and gives
            JAX its former settings back.

    Returns:
        The folder in use, one for this processor and these versions inside `directory`; or None.

    Raises:
        NotADirectoryError: If `directory` is a file.
        OSError: If it cannot be made.
        PermissionError: If it belongs to somebody else, or others can write to it.

    Example:
        >>> import jaxhandler as jh
        >>> folder = jh.enable_plan_store("plans")
        >>> folder.parent.name
        'plans'
        >>> jh.enable_plan_store(None)
    """
    config: Any = jax.config
    with _Process.lock:
        chosen = None if directory is None else _private(Path(directory))
        names = ("jax_compilation_cache_dir", *_SETTINGS)
        if _Process.former is None:
            _Process.former = {name: getattr(config, name) for name in names}
        settings = _Process.former
        if chosen is not None:
            settings = {"jax_compilation_cache_dir": str(chosen / "xla"), **_SETTINGS}
        for name, value in settings.items():
            config.update(name, value)
        if chosen is None:
            _Process.former = None
        # JAX looks for a cache once; a process that has compiled before would never look again.
        compilation_cache.reset_cache()
        _Process.folder = chosen
    return chosen


def compile_fn(identity: object) -> Callable[..., Any]:
    """Returns what compiles an engine's plans, or takes them from the store where there is one.

    Args:
        identity: What tells the model from others, with all constants of its plans; its `repr` is
            part of the key.

    Returns:
        `compile_fn(fn, args, ask)`, as `Engine.compile_fn` has it.
    """

    def make(fn: Callable[..., Any], args: tuple[Any, ...], ask: Callable[[], None]) -> Any:
        folder, device = _Process.folder, _only_device(args)
        if folder is None or device is None:
            return compile_plan(fn, args)
        flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        kind = device.platform, device.device_kind, device.client.platform_version, device.id
        key = repr((identity, signature(args), kind, flags))
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.plan"
        executable = _read(path, device)
        if executable is not None:
            return _Stored(executable, device, lambda: _compile(fn, args), ask)
        compiled = _compile(fn, args)
        _write(path, compiled)
        return compiled

    return make


class _Stored:
    """A plan whose executable is called past JAX, until the plan that JAX loads takes its place.

    JAX has no public way to make a plan of an executable but a pickle. Whatever goes wrong past it
    is done again by the plan.
    """

    def __init__(
        self,
        executable: Any,
        device: Any,
        load: Callable[[], Any],
        ask: Callable[[], None],
    ) -> None:
        self._executable, self._device = executable, device
        self._load, self._ask = load, ask
        self._plan: Any = None
        self._calls = itertools.count(1)

    def __call__(self, *args: Any) -> Any:
        plan, executable = self._plan, self._executable
        if plan is not None or executable is None:
            return self._plan(*args)
        if next(self._calls) == _CALLS_BEFORE_LOADING:
            self._ask()
        try:
            arrays = [self._put(arg) for arg in args]
            outputs = executable.execute_sharded(arrays).disassemble_into_single_device_arrays()
            return [shards[0] for shards in outputs]
        except Exception:
            self.replace()
            return self._plan(*args)

    def _put(self, arg: Any) -> Any:
        there = isinstance(arg, jax.Array) and arg.devices() == {self._device}
        return arg if there else jax.device_put(arg, self._device)

    def replace(self) -> None:
        """Loads the plan, which is called from now on."""
        if self._plan is None:
            self._plan = self._load()
            self._executable = None


def _compile(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Compiles as `compile_plan` does, for an executable that takes every argument."""

    def plan(*args: Any) -> Any:
        return fn(*args)

    return compile_lowered(jax.jit(plan, keep_unused=True).trace(*args).lower())


def _only_device(args: tuple[Any, ...]) -> Any:
    """The device on which plans of `args` run, or None where that is not the default one."""
    default = jax.device_put(np.int32(0)).devices()
    lie_on = [arg.sharding.device_set for arg in args if arg.sharding is not None]
    return next(iter(default)) if all(devices == default for devices in lie_on) else None


def _read(path: Path, device: Any) -> Any:
    """The executable at `path`; None where there is none, or none that is whole and fits."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            return None
        return device.client.deserialize_executable(data[_DIGEST:], [device])
    except Exception:
        return None


def _write(path: Path, compiled: Any) -> None:
    executable = compiled.runtime_executable()
    try:
        data = executable.serialize()
    except Exception:
        # Not every platform can; JAX's own cache is there yet.
        return
    try:
        with atomic_write(path) as fresh, open(fresh, "xb", opener=private) as file:
            file.write(hashlib.sha256(data).digest() + data)
    except OSError as error:
        fix = "Make room, or call jh.enable_plan_store with another folder."
        seen, expected = f"{error}", "a folder to write to"
        warn(explain("the plan store", seen=seen, expected=expected, fix=fix))


def _private(directory: Path) -> Path:
    """Makes the folder of this processor and these versions, refusing what others can change."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(explain(str(directory), seen="a file", expected="a folder"))
    digest = hashlib.sha256(repr((processor(), versions())).encode()).hexdigest()
    folder = directory.resolve() / f"{platform.machine()}-{digest[:16]}"
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        _check_private(folder)
    return folder


def _check_private(folder: Path) -> None:
    fix = "Choose a folder that does not exist yet, below one of your own."
    for each in (folder, folder.parent):
        found = each.stat()
        if found.st_uid != os.getuid():
            seen, expected = f"a folder of user {found.st_uid}", f"one of user {os.getuid()}"
            raise PermissionError(explain(str(each), seen=seen, expected=expected, fix=fix))
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            seen = f"permissions {stat.filemode(found.st_mode)}"
            expected = "that only its owner can write to it"
            raise PermissionError(explain(str(each), seen=seen, expected=expected, fix=fix))
    for each in folder.parents:
        mode = each.stat().st_mode
        # Who can rename the folder can put another in its place; a sticky one forbids that.
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            seen, expected = "a folder that everybody can write to", "one of few"
            raise PermissionError(explain(str(each), seen=seen, expected=expected, fix=fix))
