"""Detectors with deformable layers and deformable RoI pooling: a guest, of which nothing else here knows."""
