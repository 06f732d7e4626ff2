"""The scattered light of TESS Full Frame Images as an analysis-ready dataset."""
