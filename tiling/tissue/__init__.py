"""Where a slide's tissue is: mask, pen and blur, regions drawn by people."""
