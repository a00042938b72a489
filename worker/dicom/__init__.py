"""Reading DICOM files: UIDs, structure, fingerprints of pixel data, viewer links. No network."""
