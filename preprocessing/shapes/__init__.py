"""The embedded data set: small images of shapes, written as COCO captions, VQA v2 and NLVR2 are shipped."""
