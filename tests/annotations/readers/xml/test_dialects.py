"""ASAP, ImageScope, HALO and NDP.view: XML as they write it, holes, decimal commas, nanometres, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import shapely

from annotations import Kind, SlideContext, UserError, read_annotations


@pytest.fixture
def read(tmp_path: Path):
    def run(text: str | bytes, **options):
        path = tmp_path / "slide.xml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_annotations(path, **options)

    return run


def labels(table) -> list:
    return [table.labels[i] if i >= 0 else None for i in table.label]


def same(geometry, expected) -> bool:
    return bool(shapely.equals(geometry, expected).all())


def asap(*annotations: str) -> str:
    groups = '<AnnotationGroups><Group Name="Tumor" PartOfGroup="None" Color="#64FE2E"><Attributes/></Group></AnnotationGroups>'
    return (
        f"<?xml version='1.0'?><ASAP_Annotations><Annotations>{''.join(annotations)}</Annotations>{groups}</ASAP_Annotations>"
    )


def one(name: str, form: str, group: str, *xy: tuple[object, object], order: tuple[int, ...] = ()) -> str:
    numbers = order or tuple(range(len(xy)))
    corners = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}" />' for n, (x, y) in zip(numbers, xy, strict=True))
    attributes = f'Name="{name}" Type="{form}" PartOfGroup="{group}" Color="#F4FA58"'
    return f"<Annotation {attributes}><Coordinates>{corners}</Coordinates></Annotation>"


CORNERS = ((0, 0), (10, 0), (10, 10), (0, 10))


def test_asap(read) -> None:
    shuffled = tuple((CORNERS[i][0] + 20, CORNERS[i][1]) for i in (2, 0, 3, 1))
    table = read(
        asap(
            one("a", "Polygon", "Tumor", *CORNERS),
            one("b", "Spline", "None", *shuffled, order=(2, 0, 3, 1)),
            one("c", "Rectangle", "Tumor", ("0,5", "0,5"), ("2,5", "0,5"), ("2,5", "4,5"), ("0,5", "4,5")),
            one("d", "Dot", "Mitosis", (50, 60)),
            one("e", "PointSet", "Mitosis", (70, 80), (90, 80)),
            one("f", "Polygon", "Tumor"),
            one("g", "Measurement", "Tumor", (0, 0), (5, 5)),
        ),
        point_size_l0=4,
    )
    boxes = [(0, 0, 10, 10), (20, 0, 30, 10), (0.5, 0.5, 2.5, 4.5), (48, 58, 52, 62), (68, 78, 72, 82), (88, 78, 92, 82)]
    assert same(table.geometry, [shapely.box(*box) for box in boxes])
    assert labels(table) == ["Tumor", None, "Tumor", "Mitosis", "Mitosis", "Mitosis"]
    assert table.id.tolist() == ["a", "b", "c", "d", "e/0", "e/1"]
    assert table.kind.tolist() == [Kind.TISSUE] * 3 + [Kind.CELL] * 3
    assert table.counts == {"features": 7, "empty": 1, "lines_skipped": 1, "exploded": 1}
    assert table.log.skipped == {("Tumor", "empty"): 1, ("Tumor", "lines_skipped"): 1}


def test_asap_points_without_an_extent_and_a_scale(read) -> None:
    table = read(asap(one("a", "Polygon", "Tumor", *CORNERS), one("a", "Dot", "Mitosis", (50, 60))), scale=2, kind="cell")
    assert same(table.geometry, [shapely.box(0, 0, 20, 20)])
    assert (table.id.tolist(), table.kind.tolist()) == (["0"], [Kind.CELL])
    assert table.log.skipped == {("Mitosis", "points_skipped"): 1}


def imagescope(*layers: str) -> str:
    return f'<Annotations MicronsPerPixel="0.252000">{"".join(layers)}</Annotations>'


def layer(name: str, *regions: str, number: int = 1) -> str:
    return (
        f'<Annotation Id="{number}" Name="{name}" Type="4" LineColor="65280"><Attributes/>'
        f"<Regions><RegionAttributeHeaders/>{''.join(regions)}</Regions><Plots/></Annotation>"
    )


def region(number: int, *xy: tuple[float, float], negative: int = 0, form: int = 0, text: str = "") -> str:
    corners = "".join(f'<Vertex X="{x}" Y="{y}" Z="0" />' for x, y in xy)
    attributes = f'Id="{number}" Type="{form}" Zoom="0.5" Text="{text}" NegativeROA="{negative}"'
    return f"<Region {attributes}><Attributes/><Vertices>{corners}</Vertices></Region>"


def ring(x0: float, y0: float, x1: float, y1: float) -> tuple[tuple[float, float], ...]:
    return (x0, y0), (x1, y0), (x1, y1), (x0, y1)


def test_imagescope_holes_are_cut_from_their_layer(read) -> None:
    table = read(
        imagescope(
            layer(
                "Tumor",
                region(1, *ring(0, 0, 100, 100)),
                region(2, *ring(20, 20, 40, 40), negative=1),
                region(3, *ring(30, 30, 50, 50), negative=1),
                region(4, *ring(200, 0, 210, 10)),
                region(5, *ring(190, -10, 220, 20), negative=1),
                region(6, *ring(900, 900, 910, 910), negative=1),
            ),
            layer("", region(7, *ring(10, 10, 60, 60), text="gland"), number=2),
        )
    )
    holes = shapely.union(shapely.box(20, 20, 40, 40), shapely.box(30, 30, 50, 50))
    assert same(table.geometry, [shapely.box(0, 0, 100, 100).difference(holes), shapely.box(10, 10, 60, 60)])
    assert (labels(table), table.id.tolist()) == (["Tumor", "gland"], ["1:1", "2:7"])
    assert table.counts == {"features": 7, "holes": 3, "holes_dropped": 1, "zero_area": 1}
    assert table.log.skipped == {("Tumor", "zero_area"): 1}


def test_imagescope_shapes(read) -> None:
    bow = ((0, 0), (10, 10), (10, 0), (0, 10))
    table = read(
        imagescope(
            layer(
                "a",
                region(1, *ring(0, 0, 20, 10), form=2),
                region(2, (0, 0), (6, 8), form=1),
                region(3, (0, 0), (6, 8), form=3),
                region(4, (5, 5), form=5),
                region(5, *bow),
                region(6, (0, 0), (5, 5)),
                region(7),
            )
        ),
        point_size_l0=2,
    )
    assert table.geometry[0].area == pytest.approx(3.14159 * 50, rel=2e-3)
    assert table.geometry[0].bounds == (0, 0, 20, 10)
    assert same(table.geometry[1:3], [shapely.box(0, 0, 6, 8), shapely.box(4, 4, 6, 6)])
    assert table.geometry[3].area == 50
    assert table.kind.tolist() == [Kind.TISSUE, Kind.TISSUE, Kind.CELL, Kind.TISSUE]
    assert table.counts == {"features": 7, "lines_skipped": 1, "empty": 1, "invalid_dropped": 1, "repaired": 1}
    assert table.log.repaired == {"a": 1}


def halo(*layers: str) -> str:
    return f"<Annotations>{''.join(layers)}</Annotations>"


def halo_layer(name: str, *regions: str) -> str:
    return f'<Annotation LineColor="65280" Name="{name}" Visible="True"><Regions>{"".join(regions)}</Regions></Annotation>'


def halo_region(form: str, *xy: tuple[float, float], negative: str = "0") -> str:
    corners = "".join(f'<V X="{x}" Y="{y}" />' for x, y in xy)
    attributes = f'Type="{form}" HasEndcaps="0" NegativeROA="{negative}"'
    return f"<Region {attributes}><Vertices>{corners}</Vertices><Comments><Comment>seen</Comment></Comments></Region>"


def test_halo_shapes_are_told_by_words(read) -> None:
    table = read(
        halo(
            halo_layer(
                "Tumor",
                halo_region("Polygon", (50, 50), (150, 50), (150, 150)),
                halo_region("Rectangle", (350, 350), (250, 250)),
                halo_region("Ellipse", (450, 250), (550, 350)),
                halo_region("Polyline", (0, 0), (9, 0), (9, 9)),
                halo_region("Ruler", (0, 0), (9, 0)),
                halo_region("Polygon"),
                halo_region("Polygon", (1, 1), (2, 2)),
                halo_region("Rectangle", (5, 5), (5, 9)),
            ),
            halo_layer("Mitosis", halo_region("Pin", (40, 60))),
            halo_layer("", halo_region("Freehand", *ring(0, 0, 10, 10))),
        ),
        point_size_l0=2,
    )
    assert same(
        table.geometry[[0, 1, 3, 4]],
        [
            shapely.Polygon([(50, 50), (150, 50), (150, 150)]),
            shapely.box(250, 250, 350, 350),
            shapely.box(39, 59, 41, 61),
            shapely.box(0, 0, 10, 10),
        ],
    )
    assert table.geometry[2].bounds == (450, 250, 550, 350)
    assert table.geometry[2].area == pytest.approx(3.14159 * 50 * 50, rel=2e-3)
    assert labels(table) == ["Tumor"] * 3 + ["Mitosis", None]
    assert table.kind.tolist() == [Kind.TISSUE] * 3 + [Kind.CELL, Kind.TISSUE]
    assert len(set(table.id)) == 5
    assert table.log.skipped == {
        ("Tumor", "lines_skipped"): 2,
        ("Tumor", "empty"): 1,
        ("Tumor", "invalid_dropped"): 1,
        ("Tumor", "zero_area"): 1,
    }
    assert table.counts["features"] == len(table) + sum(table.log.skipped.values())


def test_halo_negative_regions_are_holes_of_the_regions_around_them(read) -> None:
    table = read(
        halo(
            halo_layer(
                "Tumor",
                halo_region("Polygon", *ring(20, 20, 60, 60), negative="1"),
                halo_region("Polygon", *ring(0, 0, 100, 100)),
                halo_region("Polygon", *ring(30, 30, 40, 40)),
                halo_region("Ellipse", (200, 200), (300, 300)),
                halo_region("Rectangle", (240, 240), (260, 260), negative="true"),
                halo_region("Rectangle", (900, 900), (910, 910), negative="1"),
            ),
            halo_layer("Stroma", halo_region("Polygon", *ring(0, 0, 80, 80))),
        )
    )
    around = shapely.box(0, 0, 100, 100).difference(shapely.box(20, 20, 60, 60))
    assert same(table.geometry[[0, 1, 3]], [around, shapely.box(30, 30, 40, 40), shapely.box(0, 0, 80, 80)])
    assert len(table.geometry[2].interiors) == 1
    assert labels(table) == ["Tumor"] * 3 + ["Stroma"]
    assert table.counts == {"features": 7, "holes": 2, "holes_dropped": 1}


def test_holes_without_a_region_are_counted(read) -> None:
    lines = halo_region("Polygon", (1, 1), (2, 2)), halo_region("Rectangle", (5, 5), (5, 9), negative="1")
    table = read(halo(halo_layer("Tumor", *lines, halo_region("Polygon", *ring(0, 0, 9, 9), negative="1"))))
    assert table.counts == {"features": 3, "invalid_dropped": 1, "holes_dropped": 2}


def test_halo_with_no_region_at_all_is_read_as_empty(read) -> None:
    assert len(read(halo(halo_layer("Tumor")))) == 0


CVAT = '<annotations><version>1.1</version><image name="a.png"><polygon points="1,1;2,2;3,1"/></image></annotations>'
NDPA = """<?xml version="1.0" encoding="utf-8" standalone="yes"?><annotations>
<ndpviewstate id="1"><title>Tumor</title><coordformat>nanometers</coordformat><x>1</x><y>2</y>
<annotation type="freehand" displayname="AnnotateFreehand" color="#000000"><closed>1</closed>
<pointlist><point><x>101000</x><y>-52000</y></point><point><x>101250</x><y>-52000</y></point>
<point><x>101250</x><y>-51500</y></point><point><x>101000</x><y>-51500</y></point></pointlist></annotation></ndpviewstate>
<ndpviewstate id="2"><title>pin</title><coordformat>nanometers</coordformat>
<annotation type="pin"><x>100000</x><y>-50000</y></annotation></ndpviewstate>
<ndpviewstate id="3"><title>round</title><coordformat>nanometers</coordformat>
<annotation type="circle"><x>100000</x><y>-50000</y><radius>2500</radius></annotation></ndpviewstate>
<ndpviewstate id="4"><title>line</title><coordformat>nanometers</coordformat>
<annotation type="freehand"><closed>0</closed><pointlist><point><x>1</x><y>1</y></point></pointlist></annotation></ndpviewstate>
<ndpviewstate id="5"><title>none</title></ndpviewstate></annotations>"""


def test_ndpa_counts_from_the_centre_of_the_glass(read) -> None:
    slide = SlideContext("s", (1000, 800), 0.25, offset_nm=(100000, -50000))
    table = read(NDPA, slide=slide, point_size_l0=2)
    assert same(table.geometry[:2], [shapely.box(504, 392, 505, 394), shapely.box(499, 399, 501, 401)])
    assert table.geometry[2].bounds == pytest.approx((490, 390, 510, 410))
    assert labels(table) == ["Tumor", "pin", "round"]
    assert table.kind.tolist() == [Kind.TISSUE, Kind.CELL, Kind.TISSUE]
    assert table.counts == {"features": 5, "lines_skipped": 1, "empty": 1}
    with pytest.raises(UserError, match="bring the NDPI slide back"):
        read(NDPA, slide=SlideContext("s", (1000, 800), 0.25))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '<!DOCTYPE a [<!ENTITY b "bbb"><!ENTITY c "&b;&b;">]><ASAP_Annotations>&c;</ASAP_Annotations>',
            "DOCTYPE or an ENTITY",
        ),
        ('<!DOCTYPE Annotations SYSTEM "file:///etc/hostname"><Annotations/>', "DOCTYPE or an ENTITY"),
        ("<ASAP_Annotations><Annotations>", "not XML"),
        ("<ASAP_Annotations>&c;</ASAP_Annotations>", "not XML"),
        ("<?xml version='1.0' encoding='klingon'?><Annotations/>", "not XML"),
        ("<html><body/></html>", "unknown kind, <html>"),
        ("<annotation><object/></annotation>", "import --boxes"),
        ("<Annotations/>", "neither ImageScope's nor ASAP's"),
        (CVAT, r"<annotations> with <polygon>, of no known program"),
        (halo(halo_layer("a", "<Region><Points><Point X='1' Y='1'/></Points></Region>")), "<Annotations> with <Point>"),
        ("<ASAP_Annotations><Annotation><XY>1 2</XY></Annotation></ASAP_Annotations>", "<ASAP_Annotations> with <XY>"),
        ("<object_annotation_list><Object/></object_annotation_list>", "unknown kind, <object_annotation_list>"),
        ("<Session><Graphic type='polygon'/></Session>", "unknown kind, <Session>"),
    ],
)
def test_refused(read, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_encodings(read) -> None:
    text = asap(one("a", "Polygon", "Tumör", *CORNERS)).removeprefix("<?xml version='1.0'?>")
    for encoding in ("utf-16", "iso-8859-1", "utf-8-sig"):
        declared = f"<?xml version='1.0' encoding='{encoding.removesuffix('-sig')}'?>{text}"
        assert labels(read(declared.encode(encoding))) == ["Tumör"]
