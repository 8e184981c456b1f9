"""What the sample images show, in the words of a report: the text that sample tokenizers and models learn.

Written for this project. Every caption describes the kind of image, never a finding, so that nothing in it
can be mistaken for a diagnosis.
"""

__all__ = ["CAPTIONS"]

CAPTIONS: dict[str, tuple[str, ...]] = {
    "chest-radiograph": (
        "a chest x-ray",
        "a frontal radiograph of the chest",
        "an x-ray of the lungs and the heart",
        "plain film showing both lungs, the ribs and the heart",
        "pa view of the thorax",
    ),
    "leg-radiograph": (
        "a leg x-ray",
        "a radiograph of the ankle",
        "plain film of the tibia, the fibula and the ankle joint",
        "a skeletal radiograph of a lower leg",
        "bones of the leg on x-ray",
    ),
    "head-ct": (
        "a head ct scan",
        "an axial ct slice of the brain",
        "computed tomography of the skull and the brain",
        "non-contrast ct of the head",
        "ct image of the skull base and the sinuses",
    ),
    "spine-ct": (
        "a spine ct scan",
        "a ct slice of a vertebra",
        "computed tomography of the thoracic spine",
        "ct image of the vertebral body and the spinal canal",
        "an axial ct of the back",
    ),
    "abdomen-ct": (
        "an abdominal ct scan",
        "an axial ct slice of the liver and the kidneys",
        "computed tomography of the upper abdomen",
        "ct of the abdomen in a soft tissue window",
        "ct image of the abdominal organs",
    ),
    "brain-perfusion-ct": (
        "a ct perfusion map of the brain",
        "color-coded blood flow of the brain from ct",
        "perfusion imaging of the brain in false color",
        "a parametric color map of cerebral blood volume",
        "a stroke protocol perfusion map",
    ),
    "shoulder-mr": (
        "an mri of the shoulder",
        "a coronal mr image of the shoulder joint",
        "magnetic resonance imaging of the humerus and the rotator cuff",
        "mr of the humeral head and the glenoid",
        "musculoskeletal mri of a shoulder",
    ),
    "abdomen-mr": (
        "an mri of the abdomen",
        "an axial mr slice of the liver and the kidneys",
        "magnetic resonance imaging of the upper abdomen",
        "contrast-enhanced mr of the abdomen",
        "mr image showing liver, spleen and kidneys",
    ),
    "head-mr": (
        "an mri of the head",
        "a magnetic resonance image of the brain",
        "mr of the cerebral cortex",
        "a slice of the brain on mri",
        "mr image of grey and white matter",
    ),
    "lymph-node-ultrasound": (
        "an ultrasound of a lymph node",
        "power doppler image of a lymph node",
        "sonography showing blood flow in a lymph node",
        "superficial ultrasound with color flow",
        "doppler sonogram of soft tissue",
    ),
    "pelvic-ultrasound": (
        "an ultrasound of the pelvis",
        "grey-scale ultrasound of the pelvis",
        "sonography of the uterus and the bladder",
        "a transabdominal sonogram of the pelvis",
        "two ultrasound views of the pelvis side by side",
    ),
    "obstetric-ultrasound": (
        "an ultrasound of a fetus",
        "prenatal ultrasound",
        "sonography in pregnancy",
        "an ultrasound measurement of the fetal size",
        "a sonogram of the fetus in the womb",
    ),
    "echocardiogram": (
        "an ultrasound of the heart",
        "cardiac ultrasound",
        "a transthoracic echo showing the heart chambers",
        "echo of the left ventricle and the mitral valve",
        "sector image of the beating heart",
    ),
    "bone-scan": (
        "a bone scan",
        "skeletal scintigraphy of the whole body",
        "nuclear medicine image of the skeleton",
        "planar scintigraphy of a whole body",
        "technetium uptake of the bones",
    ),
    "fundus": (
        "a retinal fundus photograph",
        "a photograph of the retina",
        "a picture of the back of the eye",
        "the retina and its vessels",
        "fundus image of one eye",
    ),
    "histology": (
        "a histology slide",
        "a microscope image of stained tissue",
        "immunohistochemistry of the colon",
        "brown and blue stained tissue under the microscope",
        "a pathology slide of colon glands",
    ),
}
"""Label of a sample image to other ways to say what it shows; the first way is `sample_images.LABELS`."""
