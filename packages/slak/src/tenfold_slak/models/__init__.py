"""The networks: `slak` defines them, `entrypoints` registers them with timm."""
