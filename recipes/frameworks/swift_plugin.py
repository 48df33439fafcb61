"""The selection callback under the name `ifd`, for ms-swift; see swift_sft.sh."""

from swift.callbacks import callbacks_map

from ifd_trainer.frameworks.swift import selection

callbacks_map["ifd"] = selection(keep=0.10)  # options of IFDSelectionCallback
