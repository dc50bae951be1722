"""Find a slide's tissue: mask, pen and blur, regions drawn by people."""
