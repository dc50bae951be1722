"""The losses, a paper each: DINO and iBOT, Sinkhorn, KoLeo and KDE."""
