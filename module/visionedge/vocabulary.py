"""The words of our own messages, states and codes, and the user names that cameras come with.

A password may be such a word. Masking it by its value would make each sentence with that word unreadable,
and would tell which word the password is. So these words are masked only where a secret has its place: in
addresses, headers and pairs such as ``password=…``.
"""

OWN_WORDS = frozenset(
    """
about above absent acknowledged active add added address addresses admin administrator after again against
age agent agree airplane algo alike all allow allowed alone already also always among amx analysed
analyzeduration anchor anchors and anew annotate annotations anonymous another answer answered answers any
anything api append application applied applying are area arena arrive arrived ascii aside asimddp ask
asked asks assignment assumed asyncio auth authentication authorization auto average avx away axes axis
azure azureiotedge back backpack bad bare base baseball baseline basic batch batches bbox bear bearer
because before begun behind being belongs below bench beside best better between bgr bicycle bilinear
binary bind bins black blanks block blocks body boolean born both bottleneck bottom bound box boxes braced
brings broke broken buckets budget build built bundle bundled bus busy but bytes cache calibrate call
called calls came camera cameras can cannot capability capacity capture car carries categories category
ceiling cell cells center centre centres certificate cgroup chain challenge challenges change changed
changes channel channels characters charset check checks child choice chosen class classes clients clip
clock close closed closes coco code color colour colours columns com come comes compare compared comparing
compile compiled compiling components compressed compute computed computes condition confidence config
configuration configurations connect connected connecting connection connections const constant container
content context conv convolutions copied copy core cores corners cost costs couch could count counted
counter counts cpu cpuinfo crash crashed create credential credentials css ctx cublas cuda cudnn cufft
curand customvision cut cvexport damaged data datacenter datatype date day dda decode decoded decoder
decoding deeds deeper default degrade degraded deliver delivered demanded demo denied deploy deployment
description desired details detect detection detections detector detr dev deviation device devices did
died differ different differs digest digits dilations dim dining direct disabled disk div dock docker docs
doctor document does dog done door double doubt down dozens driver drivers drives drop dropouts dropped
drops duration dxg each edge edgehub edition effective efficientdet eflow elevated else elsewhere empty
enable enabled end ended ending ends engine enough enterprise enum env environment epoch error errors
estimate eval even event events ever every everything everywhere evidence examined example excluded
exhausted exist exit exp explains export exports extend external extra fabric failed fails failure
fairness fallback falling false family far fast faster fastest fault faults fcc fell fetched fetching
figure figures file files fill filled find fine finite first fit fits fixed flags flat flight float floats
folder folders follow font footer for forbid force form format found fps fpsprobesize frame frames free
from front frozen fulfilled full function gain gate gateway gauge gave generate get give given gives goes
gone good goodput got gpu gpus grab graph graphics graphs gray grey grid group guest had half hand handed
hands hangs has have head header heads health healthz height heights held help here hides high higher
histogram hold holds home host how html http https hub hyper identity idle ignore image images img imgsz
included inf infer inference infinity info init inject input inputs inside inspect install installed
instances instead int integer integers intel internal interval into intra invalid iot iotedge iou iscrowd
its itself jitter joins journal jpeg jpg json just keep keeps kept kernel kernels key keys kind known
knows label labelcolor labels ladder lane lanes large larger last late latencies latency later latin
layered leads least leave leaves left legend length less let lets letterbox letters level levelname levels
lib libcublas libcuda libcudart libcudnn libcufft libcurand libdxcore libnvdxgdmal libonnxruntime
libraries library lie lies light like limit line linear lines linewidth link lint linux list listed listen
lists little live lived load loaded loader loading loads loc local localhost locally log login long longer
look looked looks loop loopback loses loss lost low lower machine machines made main make makes management
manifest manifests many map mapping maps masked matched max maximum maxwell may mcr mean measure measured
measuring media median megapixels meminfo memory message messages metadata method methods metrics
microsoft milliseconds min mine minimum minute minutes mismatch missing mixed mjpg mode model models
module modules moment more most motion motorcycle moved msg much multipart must muted name named names nan
nanodet narrowed native need needed needs neither nested network never new newer newest next nhwc nms
nobody node nodes noise none nor norm normalises not note notes nothing now nowhere null number numbers
numpy nvidia object objectness objects octet off offered offset often old once one ones only onnx
onnxruntime onvif open openapi opencv opened opening openvino operator operators opset opt options order
original osrelease other others otherwise ours out outbox output outputs outside over overdue overlap
overload overs oversize own owner pace package packages packets pad paddle pads page paho pair pairs
parameters parity part pass passthrough passwd password patches path paths pattern payload pci pending
people per percentiles perm permissions person photo photos picture pictures piece pip pipeline pixels
place placed placeholders placement places plain plan plant plays plots png poison port post potted
precision precisions prefer preparation prepared priority privileges pro probe probes probing problem
problems proc process processor producer profile programs properties provider providers proxy public
publish published publishes put pwd pyav pycocotools python queries query quota raise ran range ranges
rate rates ratio ratios raw reach reached read reads ready readyz really realm reason reasons rebuild
received recipe reconnect reconnecting recovering recovery redirected ref refuse refused refuses reg
registry rejected release remedies remedy remote remove renew repeatable replace replaced report reported
reports request requested requests required resample resolution resolve responses rest restart restarting
restarts result returned rgb right room root round rounds route routes row rows rtdetr rtsp rtsps run rung
rungs running runs runtime said same sameness saturate saturation saw say says scale scaled scaling scene
schedule schema schemas scheme score scores script search second seconds secret secrets section security
see seen sees self send sent sentence sequence series server serves service session set sets settings
settled several sha shape shapes share shared sheep should show shows shutdown sig sigmoid signal
signature silent simulator since single sink size sizes skipped slo slot slow slowed small smaller smi
smpte snapshot socket softmax software some something source spare sparse speaks speed spent spinning
spool square src stable stacks stage stale stands start started starting starts stat state stated states
status statuses stay stays std stdin stdout step steps still stop stopped stopping storage store str
strategy stream stretch stride strides string strongest stuck style sub substream such sudo summary
supervisor supported suppressed suppression surrogatepass surroundings svg synthetic sys system table tag
take taken takes target task tbody tcp telemetry tell tells template templates tensor tensorrt tensors
test text tfod than that the thead their them then there these they things this thorough those thread
threads three throttle through tiles time timeout times timing title token told tolerance too tools top
total tracks traffic transport tried trt truck true trusted truth try tuple turn turns twice twin two txt
type udp uint unavailable unchanged undecided under unhealthy unified uninstall unit units unknown unlike
unmatched unplanned unreadable unsupported until untold update upload upper upstream uptime uri url usable
use used user username uses usr utf utility uvm valid value values variable variables variant vendor
verdict version versions video videos viewer viewers vision visionedge visitors vnni void wait waiting
waits wanted wants warmed warming warn warning was way ways web webp weights well went were what whatever
when where whether which while who whole whose why wide width widths will windows winver with within
without words work workload works workspace worse would write writes written wrong wsl xtick yaml yard yes
yet yolov yolox you your ytick yuv yuvj zero zeros zip zone zones
""".split()  # noqa: SIM905 - a list would take a line for each word
)
