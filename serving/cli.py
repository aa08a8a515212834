"""`lifecycle serve` and `lifecycle chat`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from lifecycle.errors import RecipeError
from serving.arguments import KEY_VARIABLE, chat_parser, serve_parser

if TYPE_CHECKING:
    from serving.service import Service

log = logging.getLogger("serving")


def serve(argv: Sequence[str]) -> int:
    """Serve a bundle over HTTP until told to stop; prints one line when ready.

    Raises:
        LifecycleError: the arguments cannot work, or the model or the port cannot be had.
    """
    args = serve_parser().parse_args(argv)
    from serving.server import bind, run, url
    from serving.settings import ServerSettings

    line = "%(asctime)s %(levelname)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=line)
    keys = _api_keys(args)
    if not keys and not _is_loopback(args.host):
        log.warning("no API key: whoever can reach %s can use this server", args.host)
    settings = ServerSettings(
        api_keys=keys,
        admin_keys=_admin_keys(args),
        adapter_root=args.adapter_root,
        evict_adapters=args.evict_adapters,
        allowed_origins=tuple(args.allowed_origin),
        allow_priority=args.allow_priority,
    )
    with bind(args.host, args.port) as listener:
        service = _open(args)

        def on_ready() -> None:
            state = "" if service.card.gated else " (ungated: no evaluation has passed this model)"
            sys.stdout.write(f"Serving {service.card.name} on {url(listener)}{state}\n")
            sys.stdout.flush()

        run(service, settings, listener, shutdown_timeout=args.shutdown_timeout, on_ready=on_ready)
    return 0


def chat(argv: Sequence[str]) -> int:
    """Talk to a bundle in the terminal, or answer the lines of standard input.

    Raises:
        LifecycleError: the arguments cannot work, or the model cannot be opened.
    """
    args = chat_parser().parse_args(argv)
    from serving.terminal import ChatOptions, talk

    options = ChatOptions(args.system, args.temperature, args.max_tokens, args.seed)
    return talk(_open(args), options)


def _open(args: argparse.Namespace) -> Service:
    from lifecycle.bundle.manifest import MANIFEST
    from lifecycle.engines.base import EngineOptions
    from lifecycle.pipeline.runs import find_folder
    from serving.service import open_service

    draft, folder = args.draft_model, find_folder(args.bundle, args.store)
    # What a stage made has no name of its own but the digest that its folder is called by.
    has_name = Path(args.bundle).is_dir() or (folder / MANIFEST).is_file()
    return open_service(
        folder,
        engine=args.engine,
        options=EngineOptions(
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len,
            threads=args.threads,
            prefix_cache_bytes=args.prefix_cache << 20,
            kv_cache_bytes=None if args.kv_cache is None else args.kv_cache << 20,
            draft_tokens=args.draft_tokens,
            draft_model=None if draft is None else find_folder(draft, args.store),
            packed_weights=args.packed_weights,
            kernels=args.kernels,
            providers=args.providers,
        ),
        name=args.served_model_name or (None if has_name else args.bundle),
        max_queue=args.max_queue,
        adapters=_adapters(args.adapter),
    )


def _adapters(given: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, folder in given:
        if name in found:
            raise RecipeError(f"--adapter {name} is given twice: {found[name]} and {folder}")
        found[name] = folder
    return found


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys that the arguments name, else that of the environment."""
    if args.api_key is not None:
        found, source = [args.api_key], "--api-key"
    elif args.api_key_file is not None:
        found, source = _read_keys(args.api_key_file, "--api-key-file"), str(args.api_key_file)
    elif KEY_VARIABLE in os.environ:
        found, source = [os.environ[KEY_VARIABLE]], KEY_VARIABLE
    else:
        return ()
    return _nonempty(found, source)


def _admin_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The operator's keys, and whether the options that need them make sense."""
    root, file = args.adapter_root, args.admin_key_file
    if args.evict_adapters and root is None:
        raise RecipeError("--evict-adapters is for adapters from --adapter-root: give that too")
    if root is None:
        return _nonempty(_read_keys(file, "--admin-key-file"), str(file)) if file else ()
    if file is None:
        raise RecipeError(
            "--adapter-root lets its callers load adapters: give --admin-key-file, with their keys"
        )
    if not root.is_dir():
        raise RecipeError(f"--adapter-root {root} is no folder")
    return _nonempty(_read_keys(file, "--admin-key-file"), str(file))


def _nonempty(found: Sequence[str], source: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in found if key.strip())
    if not keys:
        # An empty key, say of an unset variable, must not open the server to everybody.
        raise RecipeError(f"{source} holds no API key: give one, or leave it out")
    return keys


def _read_keys(path: Path, option: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{option} {path} cannot be read: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
