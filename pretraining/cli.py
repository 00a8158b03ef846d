"""``hiendmae_pretrain``."""


def main() -> None:
    raise SystemExit(0)
