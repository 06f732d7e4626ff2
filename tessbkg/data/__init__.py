"""Tables that ship with tessbkg, beside the scripts that made them.

``tess_ephemeris.npy``, ``tess_ephemeris.json``
    Where TESS was: see ``make_ephemeris.py``.
``pointings.csv``
    Where TESS pointed in each sector: see ``make_pointings.py``.
``camera_corners.csv``
    Where the corner pixels of each CCD are in its camera: the first line says how it was made.
"""
