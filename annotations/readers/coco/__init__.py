"""COCO json: of many images, or of one slide; polygons and run-length masks."""
