"""From slide files to training batches: object choice, object-aware crops, masks, augmentation."""
