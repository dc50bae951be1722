"""`tile`: one slide file a slide."""
